"""Which modules a config aims at: PEFT's own answer stands beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packages import write_peft_folder
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from adapterhub.errors import AdapterUnsupported
from adapterhub.package.lora_config import LoraConfig as Config
from adapterhub.package.lora_config import lora_tensors, read_lora_config
from adapterhub.package.safetensors_header import TensorInfo

MODULES = [
    "lm_head",
    "layers.1.mlp.up_proj",
    "layers.0.mlp.up_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.0.mlp.experts.1.up_proj",
    "vision.blocks.1.layers.0.up_proj",
    "model.layers.1.up_proj.inner",
]
CONFIGS: dict[str, dict[str, Any]] = {
    "layers": {"layers_to_transform": [1]},
    "one layer of a list": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "layers of two lists": {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    "layers of two lists, the other way": {"layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]},
    "a saved head": {"target_modules": ["up_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "saved modules around the layers": {"modules_to_save": ["mlp"]},
    "saved modules of a longer name": {"modules_to_save": ["model.layers.1.mlp", "visio"]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_aims_at_what_peft_aims_at(tmp_path: Path, config: dict[str, Any]) -> None:
    options = {"target_modules": ["up_proj"]} | config
    theirs = LoraConfig(**options)
    ours = read_lora_config(write_peft_folder(tmp_path, **options))
    for module in MODULES:
        assert ours.aims_at(module) == bool(check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize("field", ["modules_to_save", "layers_pattern"])
def test_a_pattern_where_names_belong_is_refused(tmp_path: Path, field: str) -> None:
    """PEFT matches these by Python's engine, which may take forever."""
    with pytest.raises(AdapterUnsupported, match="is a pattern"):
        read_lora_config(write_peft_folder(tmp_path, **{field: ["(a+)+"]}))
    assert json.loads((tmp_path / "adapter_config.json").read_text())[field]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_more_patterns_than_a_model_has_modules_are_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(AdapterUnsupported, match=r"5,000 patterns of ranks or alphas: expected at most 4,096"):
        read_lora_config(write_peft_folder(tmp_path, **{field: {f"a{number}": 2 for number in range(5000)}}))


@pytest.mark.timeout(20)
def test_more_matches_than_end_in_time_are_refused() -> None:
    patterns = {f"a{number}": 2 for number in range(4000)}
    config = Config(4, 8.0, False, False, ("q",), patterns, dict(patterns))
    header = {
        f"base_model.model.{number}.q.lora_{half}.weight": TensorInfo("F32", (4, 4), 0, 64)
        for number in range(1001)
        for half in "AB"
    }
    with pytest.raises(AdapterUnsupported, match=r"8,000 patterns of ranks and alphas for 1,001 modules"):
        lora_tensors(header, config)
