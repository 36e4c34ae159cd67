"""What is no base: told in one line, before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from safetensors.torch import load_file, save_file

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases import loading
from adapterhub.bases.checks import read_config
from adapterhub.compatibility import module_shapes
from adapterhub.errors import AdapterHubError, BaseNotFound

Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content) and None


def other(model_type: str) -> Change:
    return lambda folder: tiny_config(model_type).save_pretrained(folder)


def t5(folder: Path) -> None:
    from transformers import T5Config

    T5Config(num_layers=2, d_model=64, num_heads=4).save_pretrained(folder)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])


def only_a_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 20).to_bytes(8, "little"))


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weight(name: str, shape: tuple[int, ...] | None) -> Change:
    """Remove a weight, or give it another shape."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors | ({} if shape is None else {name: torch.ones(shape)}), path, {"format": "pt"})

    return change


OWN_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
FAULTS: dict[str, tuple[Change, str]] = {
    "no JSON": (text("config.json", "{"), "cannot be read"),
    "no object": (text("config.json", "[]"), "not a JSON object"),
    "no model type": (text("config.json", "{}"), "has model_type None"),
    "an architecture of tomorrow": (config(model_type="llama9"), "'llama9', which transformers"),
    "its own code": (config(model_type="own", auto_map=OWN_CODE, architectures=["OwnForCausalLM"]), "never run here"),
    "its own code under a known type": (config(auto_map=OWN_CODE, architectures=["OwnForCausalLM"]), "never run here"),
    "an encoder": (other("roberta"), "roberta is an encoder"),
    "an encoder-decoder": (t5, "t5 is an encoder-decoder"),
    "pictures": (text("config.json", '{"model_type": "vit"}'), "no causal language model for vit"),
    "several models of text": (text("config.json", '{"model_type": "musicgen"}'), "several models of text"),
    "hidden size and heads": (config(hidden_size=66), "num_attention_heads|attention heads"),
    "heads and groups": (config(num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "a size that is text": (config(hidden_size="64"), "config.json"),
    "vocabulary": (config(vocab_size=1000), "its tokenizer has 4096 tokens, its model 1000"),
    "a missing shard": (missing_shard, "half a download: 1 of 2 files are missing"),
    "an index of names": (text("model.safetensors.index.json", '{"weight_map": ["a"]}'), "has no weight_map"),
    "an index without a map": (text("model.safetensors.index.json", "{}"), "has no weight_map"),
    "a truncated file": (truncated, "half a download"),
    "a header alone": (only_a_header, "half a download"),
    "quantized by another library": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "by gptq"),
}  # fmt: skip


WEIGHTS: dict[str, tuple[Change, str]] = {
    "no norm": (weight("model.layers.0.input_layernorm.weight", None), "layers.0.input_layernorm.weight is missing"),
    "no layer": (weight("model.layers.0.mlp.up_proj.weight", None), "layers.0.mlp.up_proj.weight is missing"),
    "another size": (weight("model.layers.0.mlp.up_proj.weight", (64, 64)), r"up_proj.weight is \(64, 64\) instead of"),
    "another norm": (weight("model.norm.weight", (32,)), r"norm.weight is \(32,\) instead of \(64,\)"),
    "more layers": (config(num_hidden_layers=9), "is missing, and"),
    "a head of its own": (config(tie_word_embeddings=False), "lm_head.weight is missing"),
}  # fmt: skip
"""Files that have other weights than the config says; transformers draws what is missing at random."""


@pytest.fixture
def base(tiny_base: StoredBase, tmp_path: Path) -> StoredBase:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base.path, folder)
    return StoredBase(folder, BaseRef("tests/base", None, None))


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_base_is_refused_in_one_line_before_weights_are_read(
    base: StoredBase, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    change, said = FAULTS[name]
    change(base.path)
    with pytest.raises(AdapterHubError, match=said) as error:
        loading.load_base(base, dtype="float32")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_weight_is_drawn_at_random(base: StoredBase, name: str, kind: Any) -> None:
    change, said = WEIGHTS[name]
    change(base.path)
    with pytest.raises(BaseNotFound, match=said) as error:
        loading.load_base(base, dtype="float32", kind=kind)
    assert len(str(error.value)) < 600


def test_code_beside_a_class_of_transformers_is_left_alone(base: StoredBase) -> None:
    """As Phi-3 and DeepSeek-V3 are published."""
    config(auto_map=OWN_CODE, architectures=["LlamaForCausalLM"])(base.path)
    (base.path / "configuration_own.py").write_text("raise SystemExit('code of a base was run')")
    assert type(read_config(base.path)).__name__ == "LlamaConfig"
    assert loading.load_base(base, dtype="float32", kind="none").model.config.model_type == "llama"


def test_a_token_that_was_added_for_pictures_is_no_contradiction(base: StoredBase) -> None:
    """As Gemma 3 1B is published: its tokenizer has one token more than the model."""
    path = base.path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 4096, "content": "<image>"})
    path.write_text(json.dumps(tokenizer))
    assert len(loading.load_base(base, dtype="float32", kind="none").tokenizer) == 4097


def test_shapes_of_a_base_are_refused_as_loading_is(base: StoredBase) -> None:
    t5(base.path)
    with pytest.raises(AdapterHubError, match="encoder-decoder"):
        module_shapes(base)
