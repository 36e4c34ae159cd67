"""Layers that a LoRA adapts: those of the language model that a package holds, and PEFT reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model
from peft import PeftModel
from trained_right import TOLERANCE, mixed_samples, training_error
from transformers import AutoModelForCausalLM

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.compatibility import check_compatible, module_shapes
from adapterhub.errors import RecipeError
from adapterhub.package.layout import read_lora
from train.model.fused_lora import fuse_lora
from train.model.lora import add_lora, save_lora, trainable
from train.model.lora_targets import linear_layers
from train.recipe import LoraSection

LORA = LoraSection(rank=2, dropout=0.0)
REF = BaseRef(id="tests/tiny", revision=None, fingerprint="fp1:" + "0" * 64)


def on_meta(family: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3", "falcon", "falcon_h1", "gemma3", "gpt2", "gpt_oss", "granitemoe", "lfm2", "llama4", "mamba2",
        "mixtral", "olmoe", "phimoe", "qwen3_moe", "qwen3_next",
    ],
)  # fmt: skip
def test_all_linear_is_trained_packed_and_reloaded_by_peft(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    base = StoredBase(path=tmp_path / "base", ref=REF, license=None)
    model.save_pretrained(base.path)
    adapted = add_lora(model, LORA).eval()
    fuse_lora(adapted)
    samples = mixed_samples(250, lengths=(30, 23))
    assert training_error(adapted, samples) < TOLERANCE
    for parameter in trainable(adapted):
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(adapted, tmp_path, base=REF)
    config, tensors = read_lora(tmp_path)
    check_compatible("a", config, tensors, module_shapes(base))
    again = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(again, str(tmp_path)).eval()
    ids = torch.tensor([samples[0].tokens])
    with torch.no_grad():
        bare = tiny_model(family)(input_ids=ids).logits
        torch.testing.assert_close(reloaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
        assert not torch.allclose(adapted(input_ids=ids).logits, bare)


@pytest.mark.parametrize(
    ("family", "left_out", "adapted"),
    [
        ("qwen3_moe", {"experts", "gate"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt_oss", {"experts", "router"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("qwen2_moe", {"experts", "gate"}, {"q_proj", "v_proj", "shared_expert_gate"}),
        ("deepseek_v3", {"experts", "gate", "gate_proj", "up_proj", "down_proj"}, {"q_b_proj", "o_proj"}),
        ("gemma3", {"fc1", "fc2", "out_proj"}, {"q_proj", "gate_proj", "down_proj"}),
        ("mamba2", {"out_proj"}, {"in_proj"}),
        ("falcon", set(), {"query_key_value", "dense"}),
        ("llama", set(), {"q_proj", "gate_proj"}),
    ],
)
def test_what_is_left_out_is_counted_with_its_reason(family: str, left_out: set[str], adapted: set[str]) -> None:
    layers = linear_layers(on_meta(family))
    counted = layers.count_left_out()
    assert left_out <= {name for name, _, _ in counted}
    assert bool(counted) == bool(left_out)
    assert all(reason and count for _, count, reason in counted)
    assert adapted <= {name.rpartition(".")[2] for name in layers.adaptable}


def test_the_vision_tower_of_gemma_3_is_not_adapted() -> None:
    names = {name for name, _ in add_lora(on_meta("gemma3"), LORA).named_parameters() if "lora_" in name}
    assert names
    assert all("language_model" in name for name in names)


@pytest.mark.parametrize("targets", [("experts",), ("gate_up_proj",), ("q_proj", "gate"), "mlp"])
def test_experts_that_are_asked_for_are_refused_by_name(targets: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        add_lora(on_meta("qwen3_moe"), LoraSection(rank=2, targets=targets))
    assert "experts: the weights of all experts are one tensor, which no package holds" in str(caught.value)
    assert "expected k_proj, o_proj, q_proj, v_proj" in str(caught.value)


def test_attention_of_a_model_with_experts_is_adapted_by_its_name() -> None:
    model = add_lora(on_meta("qwen3_moe"), LoraSection(rank=2, targets=("attention", "head")))
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    assert not model.peft_config["default"].target_parameters


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe", "deepseek_v3", "llama"])
def test_the_targets_that_peft_writes_name_the_same_layers_again(family: str) -> None:
    """They are ends of dotted names, and what a run that starts from the adapter asks for."""

    def layers(model: Any) -> set[str]:
        return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}

    first = add_lora(on_meta(family), LORA)
    written = tuple(sorted(first.peft_config["default"].target_modules))
    again = add_lora(on_meta(family), LoraSection(rank=2, targets=written))
    assert layers(again) == layers(first)
