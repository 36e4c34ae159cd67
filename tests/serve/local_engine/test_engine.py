"""The engine against PEFT and transformers' own generate: greedy tokens, in fp32, must be equal."""

from __future__ import annotations

import asyncio
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    GREEDY,
    NUM_TOKENS,
    PROMPTS,
    ask,
    greedy,
    idle,
    load_tiny,
    reference_model,
    run,
    running,
    tokens_of,
    unverified,
)
from tiny_models import TINY_VOCABULARY, make_peft_adapter

from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.choice import Choice
from serve.config import LocalEngineConfig, SchedulerLimits
from serve.engine import AdapterScale, Delta, FinishReason, GenerationRequest
from serve.local_engine import model_runner

# PEFT, of adapters on an embedding that is tied to the head: what it warns of is merging, not serving.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

MIXES = 35
"""of each of the six ways to run them: 210 in all"""

KINDS: dict[str, dict[str, Any]] = {
    "lora rank 4": {"rank": 4},
    "lora rank 16": {"rank": 16},
    "rslora": {"rank": 8, "use_rslora": True},
    "attention only": {"rank": 8, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"rank": 8, "use_dora": True},
    "embedding and head": {"rank": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "whole head": {"rank": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"rank": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "patterns": {"rank": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 40}},
}


@pytest.fixture(scope="module")
def adapters(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for number, (name, options) in enumerate(KINDS.items()):
        make_peft_adapter(root / str(number), tiny_base, seed=number, **dict(options))
        found[name] = unverified(root / str(number), number)
    return found


def reference(stored: StoredBase, adapter: Adapter | None, prompt: tuple[int, ...]) -> list[int]:
    """Greedy tokens of transformers and PEFT, fp32."""
    return greedy(reference_model(stored, adapter, torch.float32), prompt)


@pytest.fixture(scope="module")
def expected(tiny_base: StoredBase, adapters: dict[str, Adapter]) -> dict[tuple[str | None, int], list[int]]:
    named: dict[str | None, Adapter | None] = {None: None, **adapters}
    return {
        (name, number): reference(tiny_base, adapter, prompt)
        for name, adapter in named.items()
        for number, prompt in enumerate(PROMPTS)
    }


def test_the_references_differ_between_adapters(expected: dict[tuple[str | None, int], list[int]]) -> None:
    for number in range(len(PROMPTS)):
        answers = [tuple(tokens) for (_, prompt), tokens in expected.items() if prompt == number]
        assert len(set(answers)) == len(answers)


@pytest.mark.parametrize(
    "config",
    [
        LocalEngineConfig(),
        LocalEngineConfig(block_size=3, limits=SchedulerLimits(max_num_seqs=5, max_prefill_chunk=4)),
        # 22 blocks of 4 tokens: the longest answers fit alone, the mix does not, so sequences are preempted.
        LocalEngineConfig(kv_cache_bytes=22 * 4 * 512, block_size=4, limits=SchedulerLimits(max_prefill_chunk=16)),
    ],
    ids=["default", "small chunks", "preempting"],
)
@pytest.mark.parametrize("kernels", ["own", "torch"])
def test_every_request_of_random_mixes_equals_peft_alone(
    tiny_base: StoredBase,
    adapters: dict[str, Adapter],
    expected: dict[tuple[str | None, int], list[int]],
    config: LocalEngineConfig,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels == "torch":
        monkeypatch.setattr(model_runner, "load_kernels", lambda: (None, Choice("cpu kernels", "torch", "a test")))

    async def test() -> None:
        dice = random.Random(0)
        async with running(load_tiny(tiny_base), config) as engine:
            for adapter in adapters.values():
                await engine.load(adapter)

            async def one(number: int) -> None:
                name = dice.choice([None, *adapters])
                prompt = dice.randrange(len(PROMPTS))
                for _ in range(dice.randint(0, 12)):  # arrive while others run
                    await asyncio.sleep(0.001)
                mix = (AdapterScale(adapters[name].digest),) if name else ()
                request = GenerationRequest(str(number), PROMPTS[prompt], GREEDY, mix)
                assert tokens_of(await ask(engine, request)) == expected[name, prompt], (name, prompt)

            for _ in range(MIXES):
                await asyncio.gather(*(one(number) for number in range(dice.randint(2, 8))))
            await idle(engine)
            if config.kv_cache_bytes < 1 << 20:
                assert engine.status().num_preemptions > 0

    run(test)


def test_tokens_and_logprobs_are_the_same_bits_in_any_company(
    tiny_base: StoredBase, adapters: dict[str, Adapter]
) -> None:
    """Alone, in a mix of all adapters, and with the prompt in small chunks."""
    sampling = replace(GREEDY, top_logprobs=3)

    async def answers(config: LocalEngineConfig, neighbours: list[str | None]) -> dict[str | None, list[Delta]]:
        async with running(load_tiny(tiny_base), config) as engine:
            if not any(choice.value == "fused" for choice in engine.choices):
                pytest.skip("torch's own products differ with the number of rows")
            for adapter in adapters.values():
                await engine.load(adapter)

            async def one(name: str | None) -> list[Delta]:
                mix = (AdapterScale(adapters[name].digest),) if name else ()
                return await ask(engine, GenerationRequest(str(name), PROMPTS[4], sampling, mix))

            return dict(zip(neighbours, await asyncio.gather(*map(one, neighbours)), strict=True))

    async def test() -> None:
        together = await answers(LocalEngineConfig(), [None, *adapters])
        chunked = LocalEngineConfig(block_size=3, limits=SchedulerLimits(max_prefill_chunk=5))
        for name in (None, "lora rank 16", "dora"):
            assert (await answers(LocalEngineConfig(), [name]))[name] == together[name]
            assert (await answers(chunked, [name, "rslora"]))[name] == together[name]

    run(test)


def test_memory_that_nobody_wrote_reaches_no_answer(
    tiny_base: StoredBase, adapters: dict[str, Adapter], expected: dict[tuple[str | None, int], list[int]]
) -> None:
    """torch fills what it allocates with NaN: rows of the bare base, of adapters and of none must not see it."""

    async def test() -> None:
        async with running(load_tiny(tiny_base), LocalEngineConfig(block_size=3)) as engine:
            for adapter in adapters.values():
                await engine.load(adapter)

            async def one(name: str | None, prompt: int) -> None:
                mix = (AdapterScale(adapters[name].digest),) if name else ()
                request = GenerationRequest(f"{name} {prompt}", PROMPTS[prompt], GREEDY, mix)
                assert tokens_of(await ask(engine, request)) == expected[name, prompt], (name, prompt)

            names: list[str | None] = [None, *adapters, None]  # the two of the base with other prompts: ids are unique
            await asyncio.gather(*(one(name, number % 4) for number, name in enumerate(names)))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        run(test)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_repeated_prompt_is_shared_and_answered_with_the_same_bits(
    tiny_base: StoredBase, adapters: dict[str, Adapter]
) -> None:
    async def test() -> None:
        twin = unverified(adapters["dora"].path, 99)  # the same weights under another digest: nothing to share
        async with running(load_tiny(tiny_base), LocalEngineConfig(block_size=4)) as engine:
            for adapter in (adapters["dora"], twin):
                await engine.load(adapter)

            async def one(digest: str) -> list[Delta]:
                sampling = replace(GREEDY, top_logprobs=3)
                return await ask(engine, GenerationRequest(digest, PROMPTS[4], sampling, (AdapterScale(digest),)))

            first, again, others = [await one(d) for d in (adapters["dora"].digest,) * 2 + (twin.digest,)]
            assert [chunks[0].num_cached_tokens for chunks in (first, again, others)] == [0, 28, 0]
            assert tokens_of(first) == tokens_of(again) == tokens_of(others)
            if any(choice.value == "fused" for choice in engine.choices):
                assert [chunk.logprobs for chunk in first] == [chunk.logprobs for chunk in again]

    run(test)


FUSED = ("llama", "mistral", "qwen2", "qwen3")


def test_scale_zero_is_the_base_and_scales_add_up(tiny_base: StoredBase, adapters: dict[str, Adapter]) -> None:
    """One adapter at 0.4 beside itself at 0.6 (under another digest) is that adapter."""

    async def test() -> None:
        twin = unverified(adapters["rslora"].path, 99)
        async with running(load_tiny(tiny_base)) as engine:
            await engine.load(adapters["rslora"])
            await engine.load(twin)
            digest = adapters["rslora"].digest

            async def answer(*mix: AdapterScale) -> list[int]:
                return tokens_of(await ask(engine, GenerationRequest(str(mix), PROMPTS[2], GREEDY, mix)))

            base, zero, whole, halves = await asyncio.gather(
                answer(),
                answer(AdapterScale(digest, 0.0)),
                answer(AdapterScale(digest)),
                answer(AdapterScale(digest, 0.4), AdapterScale(twin.digest, 0.6)),
            )
            assert zero == base
            assert halves == whole != base

    run(test)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_standard_attention_answer_as_generate_does(
    family: str, tmp_path: Path, tiny_base: StoredBase
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, **FAMILIES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    wanted = [greedy(model, prompt) for prompt in PROMPTS]
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base.path / name, tmp_path / name)
    base = load_base(StoredBase(tmp_path, BaseRef("x")), purpose="serve", dtype="float32", kind="none")

    async def test() -> None:
        async with running(base, LocalEngineConfig(limits=SchedulerLimits(max_prefill_chunk=7))) as engine:
            has_kernels = any(choice.value == "own" for choice in engine.choices)
            is_fused = any(choice.value == "fused" for choice in engine.choices)
            assert is_fused == (has_kernels and family in FUSED)
            requests = [GenerationRequest(str(n), prompt, GREEDY) for n, prompt in enumerate(PROMPTS)]
            answers = await asyncio.gather(*(ask(engine, request) for request in requests))
            assert [tokens_of(answer) for answer in answers] == wanted

    run(test)


def test_finish_reasons_and_stop_tokens(
    tiny_base: StoredBase, expected: dict[tuple[str | None, int], list[int]]
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            whole = await ask(engine, GenerationRequest("a", PROMPTS[1], GREEDY))
            assert [chunk.finish_reason for chunk in whole] == [None] * (NUM_TOKENS - 1) + [FinishReason.LENGTH]
            stop = expected[None, 1][4]
            cut = await ask(engine, GenerationRequest("b", PROMPTS[1], replace(GREEDY, stop_token_ids=(stop,))))
            assert tokens_of(cut) == expected[None, 1][:5]
            assert cut[-1].finish_reason is FinishReason.STOP

    run(test)
