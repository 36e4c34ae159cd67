"""No answer depends on how long the sequences beside it are, or those before it were."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from engine_runs import ask, greedy, idle, run, running, tokens_of
from served_right import loaded

from adapterhub.errors import RequestTooLong
from serve.config import LocalEngineConfig
from serve.engine import GenerationRequest, SamplingParams
from serve.local_engine.rotary import fix_rotary

ORIGINAL = 32
"""Length of the original training, in tokens."""
SHORT, LONG = tuple(range(10, 15)), tuple(range(20, 20 + ORIGINAL))


def _model(kind: str, max_len: int = 128) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

    sizes = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "longrope":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
        rope["original_max_position_embeddings"] = ORIGINAL
        config = Phi3Config(**sizes, max_position_embeddings=max_len, rope_parameters=rope)
        config.original_max_position_embeddings = ORIGINAL
    else:
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
        config = LlamaConfig(**sizes, max_position_embeddings=ORIGINAL, rope_parameters=rope)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _greedy(number: int, prompt: tuple[int, ...]) -> GenerationRequest:
    return GenerationRequest(str(number), prompt, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_an_answer_beside_a_long_one_is_the_answer_alone(kind: str) -> None:
    async def test() -> None:
        config = LocalEngineConfig(kv_cache_bytes=4 << 20, max_model_len=64, block_size=4)
        async with running(loaded(_model(kind)), config) as engine:
            assert "fixed for sequences of 64 tokens" in str(engine.choices)
            alone = [tokens_of(await ask(engine, _greedy(0, SHORT)))]
            both = await asyncio.gather(*(ask(engine, _greedy(n, prompt)) for n, prompt in enumerate((SHORT, LONG))))
            later = tokens_of(await ask(engine, _greedy(0, SHORT)))
            assert [tokens_of(both[0]), later] == alone * 2
            await idle(engine)

    run(test)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_without_a_wish_sequences_stay_within_the_original_length(kind: str) -> None:
    model = _model(kind)
    right = greedy(model, SHORT)

    async def test() -> None:
        async with running(loaded(model), LocalEngineConfig(kv_cache_bytes=4 << 20)) as engine:
            assert engine.max_model_len == ORIGINAL
            assert tokens_of(await ask(engine, _greedy(0, SHORT))) == right
            with pytest.raises(RequestTooLong):
                await ask(engine, _greedy(1, LONG))

    run(test)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("longest", [ORIGINAL, 64])
def test_the_frequencies_are_those_of_transformers_for_the_longest_sequence(kind: str, longest: int) -> None:
    model, fixed = _model(kind), _model(kind)
    assert len(fix_rotary(fixed, longest)) == 1
    ids = torch.randint(3, 256, (1, longest), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        right = model(input_ids=ids).logits
        fixed(input_ids=ids[:, :4])
        assert torch.allclose(fixed(input_ids=ids).logits, right, atol=1e-5)


def test_other_embeddings_are_left_as_they_are() -> None:
    from architectures import tiny_model

    for model_type in ("llama", "gemma3_text", "gpt2"):
        assert fix_rotary(tiny_model(model_type), 64) == ()
