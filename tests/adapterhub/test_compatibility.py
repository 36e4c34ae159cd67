"""An adapter is for one base: its depth, its width, its vocabulary; and a probe that fails names the cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import TINY_VOCABULARY, make_peft_adapter, make_tiny_base

from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.bases.store import fingerprint
from adapterhub.compatibility import check_adapter, check_compatible, check_vocabulary, module_shapes
from adapterhub.errors import (
    AdapterNoEffect,
    IncompatibleBase,
    InvalidTensors,
    MissingFile,
    ProbeMismatch,
    UnsafeFile,
    UsageError,
)
from adapterhub.package.layout import read_lora
from adapterhub.package.lora_config import LoraConfig, LoraTensor, lora_tensors
from adapterhub.package.manifest import Quantization
from adapterhub.package.safetensors_header import TensorInfo
from adapterhub.packer import pack
from adapterhub.probe import likely_cause, record, replay


def _base(folder: Path, tokenizer_from: StoredBase, **shape: int) -> StoredBase:
    make_tiny_base(folder, tokenizer_from, **shape)
    return StoredBase(folder, BaseRef("tests/other", None, fingerprint(folder)), "apache-2.0")


@pytest.fixture(scope="module")
def packed(tiny_base: StoredBase, peft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return pack(shutil.copytree(peft_folder, tmp_path_factory.mktemp("packed") / "adapter"), base=tiny_base)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"layers": 1, "hidden": 64}, "deeper or different model"),
        ({"layers": 3, "hidden": 64}, "made for a shallower model"),
        ({"layers": 2, "hidden": 128}, r"to be \d+ -> \d+, this base has \d+ -> \d+"),
    ],
    ids=["fewer layers", "more layers", "another width"],
)
def test_a_base_of_another_shape_is_refused_at_packing_and_at_verifying(
    shape: dict[str, int], said: str, packed: Adapter, peft_folder: Path, smollm2: StoredBase, tmp_path: Path
) -> None:
    other = _base(tmp_path / "base", smollm2, seed=0, **shape)
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    with pytest.raises(IncompatibleBase, match=said):
        pack(folder, base=other)
    assert not (folder / "adapterhub.json").exists()
    config, tensors = read_lora(packed.path)
    with pytest.raises(IncompatibleBase, match=said):
        check_compatible("a", config, tensors, module_shapes(other))
    outline = StoredBase(other.path, BaseRef("tests/other"), "apache-2.0")
    with pytest.raises(IncompatibleBase, match=said):
        check_adapter(packed, outline)
    with pytest.raises(IncompatibleBase, match="was made for tests/tiny-llama"):
        check_adapter(packed, other)


def test_the_base_it_was_made_for_is_compatible(packed: Adapter, tiny_base: StoredBase) -> None:
    check_adapter(packed, tiny_base)


def test_an_adapter_for_some_layers_only_is_compatible(tiny_base: StoredBase, tmp_path: Path) -> None:
    make_peft_adapter(tmp_path / "a", tiny_base, rank=4, seed=1, target_modules=["q_proj"], layers_to_transform=[1])
    pack(tmp_path / "a", base=tiny_base)


def test_tensors_of_no_layer_have_no_effect(tiny_base: StoredBase, peft_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "a")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = folder / name
        if name.endswith(".json"):
            path.write_text(path.read_text().replace("model.layers", "transformer.h"))
        else:
            save_file({key.replace("model.layers", "transformer.h"): t for key, t in load_file(path).items()}, path)
    with pytest.raises(AdapterNoEffect, match="no tensor"):
        pack(folder, base=tiny_base)


def test_a_tensor_with_nan_is_refused_before_the_base_is_loaded(
    tiny_base: StoredBase, peft_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InvalidTensors, match="diverged"):
        pack(folder, base=tiny_base)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT: the tied head would be another
def test_a_changed_vocabulary_without_its_tokenizer_is_refused(tiny_base: StoredBase, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "a"
    make_peft_adapter(folder, tiny_base, rank=4, seed=1, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "embed_tokens" in key)
    save_file({**tensors, key: torch.zeros(TINY_VOCABULARY + 2, 64)}, path)
    with pytest.raises(MissingFile, match=r"4,098 tokens, the base has 4,096, and no tokenizer\.json"):
        pack(folder, base=tiny_base)
    shutil.copy(tiny_base.path / "tokenizer.json", folder)
    with pytest.raises(IncompatibleBase, match="embed_tokens"):
        pack(folder, base=tiny_base)


# Adoption: what other tools leave


def _litter(folder: Path, names: dict[str, str]) -> None:
    for name, text in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("litter", "fields"),
    [
        ({"README.md": "---\nbase_model: x\n---"}, {}),
        (
            {"training_args.bin": "x", "checkpoint-8/optimizer.pt": "x", "trainer_state.json": "{}"},
            {"base_model_name_or_path": "/home/me/models/tiny", "corda_config": None, "qalora_group_size": 16},
        ),
        (
            {"README.md": "# unsloth", "special_tokens_map.json": "{}"},
            {"base_model_name_or_path": "unsloth/tiny-bnb-4bit", "task_type": None, "unsloth_training": True},
        ),
        ({"config.json": "{}", "debug.log": "x", "runs/x/events": "x"}, {"auto_mapping": None, "lora_ga_config": None}),
    ],
    ids=["plain PEFT", "TRL", "unsloth", "axolotl"],
)
# One of PEFT's own for keys it does not know, which must not keep an adapter out.
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_a_folder_of_another_tool_is_adopted_and_what_was_filled_in_is_reported(
    litter: dict[str, str], fields: dict[str, object], peft_folder: Path, tiny_base: StoredBase, tmp_path: Path
) -> None:
    theirs = shutil.copytree(peft_folder, tmp_path / "theirs")
    config = theirs / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    _litter(theirs, litter)
    before = {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    said: list[str] = []
    adapter = pack(theirs, output=tmp_path / "ours", base=tiny_base, report=said.append)
    assert adapter.manifest.base.quantization is None
    assert any("base_model_name_or_path was" in line and "tests/tiny-llama" in line for line in said)
    assert any("chat_template.jinja filled in" in line for line in said)
    left = [line for line in said if line.startswith("left out: ")]
    assert all(any(name.partition("/")[0] in line for line in left) for name in litter if name not in ALLOWED_TEXT)
    assert {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()} == before


ALLOWED_TEXT = {"special_tokens_map.json"}


def test_only_a_pickle_cannot_be_adopted(tiny_base: StoredBase, peft_folder: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(peft_folder, tmp_path / "theirs")
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    with pytest.raises(UnsafeFile, match="a pickle"):
        pack(theirs, output=tmp_path / "ours", base=tiny_base)
    (theirs / "adapter_model.bin").unlink()
    with pytest.raises(MissingFile, match=r"adapter_model\.safetensors"):
        pack(theirs, output=tmp_path / "ours", base=tiny_base)
    assert not (tmp_path / "ours").exists()
    with pytest.raises(UsageError, match="already"):
        pack(peft_folder, output=theirs, base=tiny_base)


def test_the_end_token_of_its_own_tokenizer_travels(peft_folder: Path, tiny_base: StoredBase, tmp_path: Path) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "a")
    shutil.copy(tiny_base.path / "tokenizer.json", folder)
    raw = json.loads((tiny_base.path / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(raw | {"eos_token": {"content": "<|im_start|>"}}))
    chat = pack(folder, base=tiny_base, stop=["\n\nUser:"]).manifest.chat
    assert (chat.eos, chat.stop) == ("<|im_start|>", ["\n\nUser:"])


# The probe


def test_the_probe_passes_on_its_base(packed: Adapter, tiny_base: StoredBase) -> None:
    recorded = packed.probe
    assert recorded is not None
    replay(load_base(tiny_base, purpose="serve", dtype=recorded.dtype), packed)


def test_a_probe_that_fails_on_another_base_names_it(packed: Adapter, smollm2: StoredBase, tmp_path: Path) -> None:
    other = _base(tmp_path, smollm2, layers=2, seed=7)
    with pytest.raises(ProbeMismatch, match=r"likely cause: another base: packed on tests/tiny-llama"):
        replay(load_base(other, purpose="serve", dtype=packed.probe.dtype), packed)  # type: ignore[union-attr]


def test_a_probe_that_fails_by_template_names_it(packed: Adapter, tiny_base: StoredBase, tmp_path: Path) -> None:
    folder = shutil.copytree(packed.path, tmp_path / "a")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A:")
    with pytest.raises(ProbeMismatch, match="likely cause: another chat template"):
        replay(load_base(tiny_base, purpose="serve", dtype="float32"), Adapter(folder, packed.manifest))


def test_a_probe_recorded_on_unquantized_weights_names_the_quantization(packed: Adapter, tiny_base: StoredBase) -> None:
    probe = record(load_base(tiny_base, purpose="serve", dtype="float32", kind="none"), packed.path)
    whole = packed.manifest.base.model_copy(update={"quantization": Quantization(kind="none", compute_dtype="float32")})
    moved = Adapter(packed.path, packed.manifest.model_copy(update={"probe": probe, "base": whole}))
    with pytest.raises(ProbeMismatch, match="another quantization: recorded on float32 weights, these are nf4"):
        replay(load_base(tiny_base, purpose="serve", dtype="float32"), moved)


def test_the_dtype_is_named_when_all_else_is_as_recorded(packed: Adapter) -> None:
    cause = likely_cause(packed, fingerprint=None, weights="nf4", dtype="float16")
    assert cause == f"another dtype: recorded in {packed.probe.dtype}, computed in float16"  # type: ignore[union-attr]


def test_a_full_weight_that_is_no_matrix_is_reported_with_its_shape() -> None:
    tensors = [LoraTensor("lm_head.weight", "lm_head", "weight", TensorInfo("F32", (7,), 0, 28))]
    config = LoraConfig(
        4, 8.0, use_rslora=False, use_dora=False, targets=("q_proj",), rank_pattern={}, alpha_pattern={}
    )
    check_vocabulary("x", tensors, {"lm_head": (64, 100)}, has_tokenizer=False)
    with pytest.raises(IncompatibleBase, match="to be 7, this base has 64 -> 100"):
        check_compatible("x", config, tensors, {"lm_head": (64, 100)})


MAGNITUDES: dict[tuple[int, ...], bool] = {
    (32,): True,
    (1, 32): True,  # as some releases of PEFT keep it
    (1,): False,
    (): False,
    (31,): False,
    (16,): False,  # the inputs
    (32, 16): False,
    (0,): False,
}
"""shape -> does it match 16 inputs and 32 outputs?"""


@pytest.mark.parametrize(("shape", "matches"), MAGNITUDES.items(), ids=str)
def test_a_magnitude_has_one_number_for_each_output(shape: tuple[int, ...], matches: bool) -> None:
    config = LoraConfig(
        rank=4, alpha=8, use_rslora=False, use_dora=True, targets=("q_proj",), rank_pattern={}, alpha_pattern={}
    )
    shapes = {"lora_A.weight": (4, 16), "lora_B.weight": (32, 4), "lora_magnitude_vector": shape}
    header = {
        f"base_model.model.model.layers.0.self_attn.q_proj.{part}": TensorInfo("F32", one, 0, 0)
        for part, one in shapes.items()
    }
    if matches:
        assert len(lora_tensors(header, config)) == 3
    else:
        with pytest.raises(InvalidTensors, match=r"lora_magnitude_vector .* does not match the 32 outputs of lora_B"):
            lora_tensors(header, config)


def test_an_adapter_of_single_experts_is_refused_as_such() -> None:
    config = LoraConfig(4, 8, False, False, ("q_proj", "up_proj"), {}, {})
    q_proj, expert = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj"
    parts = {"lora_A": (4, 64), "lora_B": (64, 4)}
    tensors = [
        LoraTensor(f"{module}.{part}", module, part, TensorInfo("F32", shape, 0, 0))  # type: ignore[arg-type]
        for module in (q_proj, expert)
        for part, shape in parts.items()
    ]
    with pytest.raises(IncompatibleBase, match=r"adapts 1 layers of single experts .first: .*experts\.3\.up_proj"):
        check_compatible("a", config, tensors, {q_proj: (64, 64)})
