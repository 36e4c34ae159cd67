"""PEFT matches names alone, in linear time, whatever patterns an adapter's author wrote."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from tiny_models import make_peft_adapter

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.bases.peft_config import PATTERN_FIELDS, exactly
from adapterhub.package.layout import open_adapter
from adapterhub.package.lora_config import CONFIG_NAME
from adapterhub.packer import pack
from adapterhub.probe import replay
from train.model.lora import continue_lora

_NAME = st.lists(st.sampled_from(["a", "b", "1", "10", "x_y", "é+"]), min_size=1, max_size=4).map(".".join)
_FOREVER = r"(([a-z_0-9]+\.?)+)+!"
"""Python's engine tries every way to split a name into parts before it gives this up."""


@given(names=st.sets(_NAME), others=st.sets(_NAME))
def test_a_pattern_of_names_matches_these_and_no_others(names: set[str], others: set[str]) -> None:
    pattern = re.compile(exactly(names))
    assert {name for name in names | others if pattern.fullmatch(name)} == names


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    "patterns",
    [
        {"target_modules": rf".*self_attn\.[qv]_proj|{_FOREVER}"},
        {"target_modules": "all-linear", "exclude_modules": rf".*mlp.*|.*[ko]_proj|{_FOREVER}"},
        {"rank_pattern": {_FOREVER: 2}, "alpha_pattern": {_FOREVER: 2}},
    ],
    ids=["targets", "excluded", "ranks and alphas"],
)
def test_patterns_that_stop_pythons_engine_are_packed_and_trained_on(
    tiny_base: StoredBase, tmp_path: Path, patterns: dict[str, object]
) -> None:
    plain = tmp_path / "plain"
    make_peft_adapter(plain, tiny_base, rank=4, seed=1, target_modules=["q_proj", "v_proj"])
    folder = shutil.copytree(plain, tmp_path / "with")
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | patterns))
    adapter = pack(folder, base=tiny_base)
    assert adapter.probe == pack(plain, base=tiny_base).probe
    loaded = load_base(tiny_base, dtype="float32")
    replay(loaded, open_adapter(folder))
    config = continue_lora(loaded.model, adapter, dropout=0.0).peft_config["default"]
    as_written = LoraConfig.from_pretrained(str(folder))
    assert all(getattr(config, field) == getattr(as_written, field) for field in PATTERN_FIELDS)
