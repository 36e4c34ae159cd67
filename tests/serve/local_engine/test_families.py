"""Families of bases answer as transformers' `generate` and PEFT do, alone and beside others, with and without adapters.

`docs/models.md` has them all; these are one of each kind.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from architectures import tiny_config, tiny_model
from engine_runs import GREEDY, PROMPTS, ask, greedy, load_tiny, reference_model, run, running, tokens_of, unverified
from served_right import served_right
from tiny_models import TINY_VOCABULARY, copy_tokenizer, make_peft_adapter
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.capabilities import BATCHED, capability_of
from adapterhub.compatibility import check_compatible, module_shapes
from adapterhub.errors import BaseUnsupported
from adapterhub.package.layout import read_lora
from serve.engine import AdapterScale, GenerationRequest

KINDS = {
    "gemma3_text": ("batched", "windows in some layers, norms and an embedding of its own"),
    "gpt_oss": ("batched", "attention sinks, fused experts"),
    "deepseek_v3": ("batched", "keys wider than values"),
    "qwen3_moe": ("batched", "experts"),
    "nemotron": ("batched", "layers that hand no keywords down"),
    "gpt_neox": ("batched", "joined queries, keys and values; a part of each head rotated"),
    "opt": ("batched", "learned positions"),
    "cohere2": ("batched", "layers without positions"),
    "bloom": ("single", "ALiBi"),
    "falcon": ("single", "an attention of its own"),
    "llama4_text": ("single", "attention in chunks"),
    "diffllama": ("single", "an attention that is called twice"),
    "lfm2": ("single", "convolutions"),
    "qwen3_5_text": ("single", "linear attention"),
    "bamba": ("single", "Mamba layers"),
    "falcon_mamba": ("single", "no attention at all"),
    "jetmoe": ("single", "experts of attention"),
    "deepseek_v4": ("single", "linear layers that multiply in groups, which no adapter changes"),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_every_answer_is_that_of_generate_and_of_peft(model_type: str, tmp_path: Path) -> None:
    mode, _ = KINDS[model_type]
    found = served_right(tiny_model(model_type), folder=tmp_path / "adapter")
    assert (found.mode, found.difference) == (mode, "")


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "xlnet"])
def test_a_base_that_keeps_its_state_in_itself_or_sees_what_follows_is_found(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no list named it."""
    monkeypatch.setattr("adapterhub.bases.capabilities._OTHER_WITH_CACHE", frozenset())
    monkeypatch.setattr("adapterhub.bases.capabilities._NOT_CAUSAL", {})
    with pytest.raises(BaseUnsupported, match=f"{model_type}.* is not served: .*one sequence at a time, "):
        served_right(tiny_model(model_type))


def test_a_wrong_mode_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its prompt is longer than its window, which the self-check's prompts are not: so there is a list."""
    monkeypatch.setattr("adapterhub.bases.capabilities.BATCHED", BATCHED | {"llama4_text"})
    found = served_right(tiny_model("llama4_text"), folder=tmp_path / "adapter")
    assert found.mode == "batched"
    assert found.difference


@pytest.mark.parametrize(("has_states", "mode"), [(False, "batched"), (True, "single")])
def test_a_hybrid_without_other_states_is_served_in_a_batch(has_states: bool, mode: str) -> None:
    config = tiny_config("granitemoehybrid")
    if not has_states:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    found = served_right(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    assert (found.mode, found.difference) == (mode, "")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_gpt2_in_nf4_answers_as_peft(smollm2: StoredBase, tmp_path: Path) -> None:
    """Its linear layers are stored the other way round, and only quantized ones are linear layers of torch."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=TINY_VOCABULARY, n_positions=256, n_embd=64, n_layer=2, n_head=4)
    config.initializer_range, config.bos_token_id, config.eos_token_id = 0.2, 1, 2
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    copy_tokenizer(smollm2.path, tmp_path / "base")
    stored = StoredBase(tmp_path / "base", BaseRef("tests/tiny-gpt2"))
    make_peft_adapter(tmp_path / "adapter", stored, rank=4, seed=0)
    config_path = tmp_path / "adapter" / "adapter_config.json"
    # As PEFT writes it for quantized layers, which are stored as others are.
    config_path.write_text(config_path.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    adapter = unverified(tmp_path / "adapter", 0)
    lora, tensors = read_lora(adapter.path)
    check_compatible("gpt2", lora, tensors, module_shapes(stored))
    right = [[greedy(reference_model(stored, used, torch.float32), p) for p in PROMPTS] for used in (None, adapter)]

    async def test() -> None:
        async with running(load_tiny(stored)) as engine:
            assert engine.mode == "batched"
            await engine.load(adapter)
            mixes = ((), (AdapterScale(adapter.digest),))
            requests = [
                GenerationRequest(f"{n} {len(mix)}", prompt, GREEDY, mix)
                for mix in mixes
                for n, prompt in enumerate(PROMPTS)
            ]
            answers = [tokens_of(answer) for answer in await asyncio.gather(*(ask(engine, one) for one in requests))]
            assert answers == [*right[0], *right[1]]

    run(test)


@pytest.mark.parametrize("model_type", ["bert", "t5", "bart"])
def test_what_is_no_causal_language_model_is_refused(model_type: str) -> None:
    support = capability_of(CONFIG_MAPPING[model_type]()).serve
    assert support.mode == "refused"
    assert "not a causal language model" in support.reason
