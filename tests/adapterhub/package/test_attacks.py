"""Every kept attack is refused with its own error; and no bytes at all crash, hang or fill the memory."""

from __future__ import annotations

import filecmp
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_attacks import ATTACKS, SAMPLES, make
from packages import write_manifest, write_package
from road import run_any
from safetensors.numpy import load_file, save_file

from adapterhub import errors
from adapterhub.errors import (
    AdapterHubError,
    AdapterUnsupported,
    Incompatible,
    InvalidManifest,
    InvalidTensors,
    PackageError,
)
from adapterhub.hub.client import Hub
from adapterhub.package.layout import open_adapter
from adapterhub.package.safetensors_header import read_header
from adapterhub.registry.registry import Registry


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_kept_attack_is_refused_with_its_own_error(sample: str) -> None:
    with pytest.raises(AdapterHubError) as caught:
        open_adapter(ATTACKS / sample)
    assert type(caught.value) is getattr(errors, SAMPLES[sample][0]), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_kept_attack_is_what_the_script_makes(sample: str, tmp_path: Path) -> None:
    made = make(sample, tmp_path / "made")
    found = filecmp.dircmp(made, ATTACKS / sample, ignore=[])
    assert found.left_only + found.right_only + found.diff_files + found.funny_files == []


def test_an_attack_leaves_nothing_in_the_registry(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "home")
    for sample in SAMPLES:
        with pytest.raises((PackageError, Incompatible)):
            registry.add(open_adapter(ATTACKS / sample))
    assert registry.list() == []


def test_the_command_refuses_one_in_a_line(home: Path) -> None:
    done = run_any("add", str(ATTACKS / "pickle"), home=home)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 299_999, 300_000, -1])
def test_a_nan_or_inf_is_found_wherever_it_is(tmp_path: Path, dtype: str, value: float, place: int) -> None:
    """Several chunks of 1 MiB, the largest finite values all around."""
    import torch

    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}[dtype]
    largest = torch.finfo(kind).max
    values = torch.full((4, 150_001), largest, dtype=kind)
    values[1::2] = -largest
    folder = write_package(tmp_path / "p")
    _save(folder, values)
    open_adapter(folder)
    values.view(-1)[place] = value
    _save(folder, values)
    with pytest.raises(InvalidTensors, match=r"lora_A\.weight contains NaN or Inf"):
        open_adapter(folder)


def _save(folder: Path, a: object) -> None:
    import torch
    from safetensors.torch import save_file as save

    key = "base_model.model.model.layers.0.self_attn.q_proj"
    save({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": torch.ones(32, 4)}, folder / "adapter_model.safetensors")
    write_manifest(folder)


@pytest.mark.parametrize("pattern", ["[", "x" * 20_000, "(?=a)b", "(?<=a)b", r"(a)\1", "(a{1000}){1000}"])
def test_a_pattern_that_cannot_be_matched_in_linear_time_is_refused(tmp_path: Path, pattern: str) -> None:
    folder = write_package(tmp_path / "p")
    path = folder / "adapter_config.json"
    for field in ("rank_pattern", "alpha_pattern"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: {pattern: 4}}))
        with pytest.raises(AdapterUnsupported, match="pattern"):
            write_manifest(folder)


def test_a_key_that_would_rule_the_terminal_is_shown_escaped(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    path = folder / "adapterhub.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a\n\x1b[2Jb": 1}))
    with pytest.raises(InvalidManifest, match=r"a\\n\\x1b\[2Jb: Extra inputs are not permitted"):
        open_adapter(folder)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
_QUICK = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("sound") / "p")


def _opens_or_is_refused(folder: Path) -> None:
    """Anything but a refusal of ours fails the test; so does memory beyond the folder's size."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    tracemalloc.start()
    try:
        open_adapter(folder)
    except (PackageError, Incompatible) as error:
        assert str(error).isprintable()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * size + 4_000_000  # Python's objects around the bytes, and the buffer of 1 MiB


@_QUICK
@given(data=st.data())
def test_a_manifest_with_anything_anywhere_opens_or_is_refused(sound: Path, data: st.DataObject) -> None:
    path = sound / "adapterhub.json"
    before = path.read_bytes()
    raw = json.loads(before)
    place = raw
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    try:
        path.write_text(json.dumps(raw))
        _opens_or_is_refused(sound)
    finally:
        path.write_bytes(before)


@_QUICK
@given(data=st.data())
def test_a_config_with_anything_anywhere_opens_or_is_refused(sound: Path, data: st.DataObject) -> None:
    path = sound / "adapter_config.json"
    before, manifest = path.read_bytes(), (sound / "adapterhub.json").read_bytes()
    raw = json.loads(before)
    keys = [*raw, "rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "layers_to_transform"]
    raw[data.draw(st.sampled_from(keys))] = data.draw(_JSON)
    try:
        path.write_text(json.dumps(raw))
        _update_manifest(sound)
        _opens_or_is_refused(sound)
    finally:
        path.write_bytes(before)
        (sound / "adapterhub.json").write_bytes(manifest)


@_QUICK
@given(data=st.data())
def test_a_header_with_anything_anywhere_opens_or_is_refused(sound: Path, data: st.DataObject) -> None:
    path = sound / "adapter_model.safetensors"
    before, manifest = path.read_bytes(), (sound / "adapterhub.json").read_bytes()
    length = int.from_bytes(before[:8], "little")
    header = json.loads(before[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))] = data.draw(
            _JSON | st.lists(st.integers(-(2**70), 2**70), max_size=3)
        )
    else:
        header[data.draw(st.text(max_size=300))] = data.draw(_JSON)
    try:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + before[8 + length :])
        _update_manifest(sound)
        _opens_or_is_refused(sound)
    finally:
        path.write_bytes(before)
        (sound / "adapterhub.json").write_bytes(manifest)


@_QUICK
@given(at=st.integers(0, 2000), bits=st.integers(1, 255))
def test_a_flipped_byte_of_the_weights_is_refused_or_read(sound: Path, at: int, bits: int) -> None:
    path = sound / "adapter_model.safetensors"
    before = path.read_bytes()
    changed = bytearray(before)
    changed[at % len(changed)] ^= bits
    try:
        path.write_bytes(changed)
        with pytest.raises(PackageError):
            open_adapter(sound)
        try:
            read_header(path)
        except InvalidTensors as error:
            assert str(error).isprintable()
    finally:
        path.write_bytes(before)


def _update_manifest(folder: Path) -> None:
    """The manifest's digests made those of the files, whatever is in them."""
    import hashlib

    path = folder / "adapterhub.json"
    raw = json.loads(path.read_text())
    for name in raw["files"]:
        data = (folder / name).read_bytes()
        raw["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.write_text(json.dumps(raw))


def test_the_reader_and_the_library_read_the_same_values(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors}, tmp_path / "again.safetensors")
    for name, info in read_header(tmp_path / "again.safetensors").items():
        data = (tmp_path / "again.safetensors").read_bytes()[info.start : info.end]
        assert np.array_equal(np.frombuffer(data, "float32").reshape(info.shape), tensors[name])


@pytest.mark.parametrize("name", ["..", "a/../../b", "a\x00b", "x" * 500, "con\n", "a b", "-rf", "", "/abs", "a//b"])
def test_a_hostile_name_reaches_neither_disk_nor_hub(tmp_path: Path, name: str) -> None:
    from adapterhub.adapter import AdapterRef

    registry = Registry(tmp_path / "home", Hub("http://127.0.0.1:9", None))
    with pytest.raises(errors.AdapterHubError):
        registry.pull(AdapterRef.parse(name), Hub("http://127.0.0.1:9", None))
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    assert list(tmp_path.iterdir()) == []
