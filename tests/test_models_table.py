"""docs/models.md says what is so: each cell is measured on a tiny random model of the architecture."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from architectures import NOT_TINY, VOCABULARY, causal_lm_types, tiny_config, tiny_model
from served_right import served_right
from trained_right import TOLERANCE, mixed_samples, training_error
from transformers.pytorch_utils import Conv1D

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.capabilities import capability_of
from adapterhub.compatibility import check_compatible, module_shapes
from adapterhub.package.layout import read_lora
from train.model.lora import add_lora, save_lora
from train.model.lora_targets import linear_layers
from train.recipe import LoraSection

ROOT = Path(__file__).parent.parent
FAMILIES = (
    "llama", "gemma3", "gpt_oss", "lfm2", "qwen3_5", "granitemoehybrid", "falcon_h1", "deepseek_v3", "gpt2", "bloom",
)  # fmt: skip
"""Measured in every run: each has something that another has not."""
IS_SOAK = "ADAPTERHUB_SOAK_S" in os.environ
MEASURED = [name for name in causal_lm_types() if name not in NOT_TINY] if IS_SOAK else FAMILIES


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "scripts" / "models_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says(table: ModuleType) -> None:
    assert (ROOT / "docs" / "models.md").read_text() == table.page(), "run `make docs`"


def test_every_family_that_people_tune_is_trained_packed_and_served(table: ModuleType) -> None:
    families = (
        "llama llama4_text mistral mixtral qwen2 qwen3 qwen3_moe qwen3_5_text gemma2 gemma3_text gemma3 phi3 smollm3 "
        "olmo2 olmo3 granite granitemoehybrid falcon falcon_h1 lfm2 gpt_oss glm4 deepseek_v2 deepseek_v3 gpt_neox gpt2 "
        "opt bloom nemotron"
    )
    for name in families.split():
        assert not [cell for cell in table.cells(name) if cell.startswith(("no", "not"))], name


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT's of GPT-2
@pytest.mark.parametrize("name", MEASURED)
def test_a_cell_is_measured(table: ModuleType, tmp_path: Path, name: str) -> None:
    trained, packed, served = table.cells(name)
    support = capability_of(tiny_config(name))
    if support.train.mode != "refused":
        assert training_error(tiny_model(name), mixed_samples(VOCABULARY)) < TOLERANCE, trained
        assert packed == "yes"
        _check_packed(name, tmp_path)
    if support.serve.mode != "refused":
        model = tiny_model(name)
        targets = sorted(linear_layers(model).adaptable)
        # PEFT's adapters on Conv1D are those of an unquantized base; a test of the engine serves them on NF4.
        is_plain = targets and not any(isinstance(layer, Conv1D) for layer in model.modules())
        found = served_right(model, folder=tmp_path / "adapter" if is_plain else None, targets=targets)
        assert (found.mode, found.difference) == (support.serve.mode, ""), served


def _check_packed(name: str, folder: Path) -> None:
    """Check that the adapter of a run on the base is one that `pack` accepts."""
    model = tiny_model(name)
    model.save_pretrained(folder / "base")
    tiny_config(name).save_pretrained(folder / "base")  # a model of pictures, too, saves the config of its text alone
    base = StoredBase(folder / "base", BaseRef("tests/tiny"))
    save_lora(add_lora(model, LoraSection(rank=4)), folder, base=base.ref)
    check_compatible(name, *read_lora(folder), module_shapes(base))
