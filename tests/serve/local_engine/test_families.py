"""Families of bases answer as transformers' `generate` and PEFT do, alone and beside others, with and without adapters.

`docs/models.md` has them all; these are one of each kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_config, tiny_model
from served_right import served_right

from adapterhub.bases.capabilities import BATCHED, capability_of
from adapterhub.errors import BaseUnsupported

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
}


@pytest.mark.parametrize("model_type", KINDS)
def test_every_answer_is_that_of_generate_and_of_peft(model_type: str, tmp_path: Path) -> None:
    mode, _ = KINDS[model_type]
    found = served_right(tiny_model(model_type), folder=tmp_path / "adapter")
    assert (found.mode, found.difference) == (mode, "")


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "xlnet"])
def test_a_base_that_keeps_its_state_in_itself_or_sees_what_follows_is_refused(model_type: str) -> None:
    with pytest.raises(BaseUnsupported, match=f"{model_type}.* is not served: .*one sequence at a time, "):
        served_right(tiny_model(model_type))


def test_a_wrong_mode_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its prompt is longer than its window, which the self-check's prompts are not: so there is a list."""
    monkeypatch.setattr("adapterhub.bases.capabilities.BATCHED", BATCHED | {"llama4_text"})
    found = served_right(tiny_model("llama4_text"), folder=tmp_path / "adapter")
    assert found.mode == "batched"
    assert found.difference


def _config(model_type: str, **changes: Any) -> Any:
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("model_type", ["bert", "t5", "bart"])
def test_what_is_no_causal_language_model_is_refused(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    support = capability_of(CONFIG_MAPPING[model_type]()).serve
    assert support.mode == "refused"
    assert "not a causal language model" in support.reason
