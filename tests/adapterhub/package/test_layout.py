from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disk_operations import recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from packages import write_manifest, write_package, write_peft_folder

from adapterhub import probe
from adapterhub.adapter import StoredBase
from adapterhub.compatibility import check_base
from adapterhub.errors import (
    AdapterUnsupported,
    DigestMismatch,
    IncompatibleBase,
    InvalidManifest,
    InvalidTensors,
    MissingFile,
    PackageError,
    UnexpectedFile,
    UnsafeFile,
)
from adapterhub.package.layout import inspect, open_adapter
from adapterhub.package.manifest import Probe, parse_manifest
from adapterhub.package.signing import make_key, sign, signer_hint
from adapterhub.packer import pack


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package")


def test_a_sound_package_opens(package: Path) -> None:
    adapter = open_adapter(package)
    assert adapter.digest.startswith("sha256:")
    assert inspect(package).parameters == 4 * 64 + 32 * 4


def test_the_digest_does_not_depend_on_the_place(package: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(package, tmp_path / "elsewhere")
    assert open_adapter(moved).digest == open_adapter(package).digest


def test_the_digest_ignores_the_card_and_follows_the_weights_and_the_base(tmp_path: Path) -> None:
    first = open_adapter(write_package(tmp_path / "a")).digest
    (tmp_path / "a" / "README.md").write_text("another card")
    assert open_adapter(tmp_path / "a").digest == first
    assert open_adapter(write_package(tmp_path / "b", seed=1)).digest != first
    assert open_adapter(write_package(tmp_path / "c", base_id="owner/other")).digest != first


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "x.pkl", "run.py", "lib.so", "data.npz"])
def test_a_file_that_can_run_code_is_refused(package: Path, name: str) -> None:
    (package / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeFile, match=name):
        open_adapter(package)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "notes.txt", "checkpoint-10/adapter_config.json"])
def test_a_file_that_does_not_belong_is_refused(package: Path, name: str) -> None:
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_text("{}")
    with pytest.raises(UnexpectedFile, match=name):
        open_adapter(package)


def test_an_allowed_file_the_manifest_does_not_list_is_refused(package: Path) -> None:
    (package / "tokenizer.json").write_text("{}")
    with pytest.raises(UnexpectedFile, match=r"tokenizer\.json"):
        open_adapter(package)


def test_a_symbolic_link_is_refused(package: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (package / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFile, match="symbolic link"):
        open_adapter(package)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"])
def test_a_missing_file_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    with pytest.raises(MissingFile, match=name):
        open_adapter(package)


def test_a_folder_without_a_manifest_is_not_a_package(package: Path) -> None:
    (package / "adapterhub.json").unlink()
    with pytest.raises(InvalidManifest, match="adapterhub pack"):
        open_adapter(package)


def test_a_tampered_byte_is_noticed(package: Path) -> None:
    weights = package / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DigestMismatch, match="sha256"):
        open_adapter(package)


def test_a_truncated_file_is_noticed_by_its_size(package: Path) -> None:
    weights = package / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DigestMismatch, match="bytes"):
        open_adapter(package)


def test_truncated_tensors_with_a_matching_manifest_are_noticed(package: Path) -> None:
    weights = package / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    write_manifest(package)
    with pytest.raises(InvalidTensors, match="ends? at byte|tensors end"):
        open_adapter(package)


def test_a_rank_that_is_not_the_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_peft_folder(tmp_path / "p", rank=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(InvalidTensors, match="rank 8"):
        write_manifest(folder)
        open_adapter(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("ensure_weight_tying", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused_by_field(tmp_path: Path, field: str, value: object) -> None:
    folder = write_peft_folder(tmp_path / "p", **{field: value})
    with pytest.raises(AdapterUnsupported, match=field):
        write_manifest(folder)


def test_an_unknown_manifest_key_and_a_newer_format_are_refused(package: Path) -> None:
    path = package / "adapterhub.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"surprise": 1}))
    with pytest.raises(InvalidManifest, match="surprise"):
        open_adapter(package)
    path.write_text(json.dumps(raw | {"format": 3}))
    with pytest.raises(InvalidManifest, match=r"format 3: expected 1 to 2\. Upgrade"):
        open_adapter(package)


def test_format_1_is_read_with_the_digest_it_had(package: Path) -> None:
    path = package / "adapterhub.json"
    raw = json.loads(path.read_text())
    assert (raw["format"], raw["license"]) == (2, "apache-2.0")
    old = {"licence": raw.pop("license"), **raw, "format": 1}
    path.write_text(json.dumps(old))
    adapter = open_adapter(package)
    assert (adapter.manifest.format, adapter.manifest.license) == (1, "apache-2.0")
    assert adapter.digest == "sha256:ed14ee2992d1402599cad0af9981674ba8a1bcfa0d0b1861a6ada81f2489b212"
    path.write_text(json.dumps(old | {"license": "mit"}))
    with pytest.raises(InvalidManifest, match="licence"):
        open_adapter(package)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(data, where="here")


def test_a_manifest_that_lists_a_path_outside_is_refused(package: Path) -> None:
    path = package / "adapterhub.json"
    raw = json.loads(path.read_text())
    raw["files"]["../secret"] = raw["files"]["adapter_config.json"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UnexpectedFile, match=r"\.\./secret"):
        open_adapter(package)


def test_every_package_error_has_one_line(package: Path) -> None:
    (package / "x.pkl").touch()
    with pytest.raises(PackageError) as caught:
        open_adapter(package)
    assert "\n" not in str(caught.value)


def test_packing_a_peft_folder_fills_in_what_is_missing(
    tmp_path: Path, tiny_base: StoredBase, peft_folder: Path
) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "adopted")
    said: list[str] = []
    adapter = pack(folder, base=tiny_base, name="adopted", report=said.append)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tests/tiny-llama"
    assert adapter.manifest.base.fingerprint == tiny_base.ref.fingerprint
    assert adapter.probe is not None
    assert len(adapter.probe.answers) == 3
    assert any("chat_template.jinja filled in" in line for line in said)
    assert "base_model: tests/tiny-llama" in (folder / "README.md").read_text()
    assert pack(folder, base=tiny_base, name="adopted").digest == adapter.digest


def test_an_adapter_for_another_base_shows_both_sides(package: Path, tiny_base: StoredBase) -> None:
    with pytest.raises(IncompatibleBase) as caught:
        check_base(open_adapter(package), tiny_base)
    assert "owner/base" in str(caught.value)
    assert "tests/tiny-llama" in str(caught.value)


def test_an_alpha_no_float_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterUnsupported, match="cannot be read as a LoRA config"):
        write_manifest(write_peft_folder(tmp_path / "p", lora_alpha=10**400))


def test_a_power_cut_during_packing_leaves_no_package_or_a_whole_one(
    tmp_path: Path, tiny_base: StoredBase, peft_folder: Path
) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "disk" / "p")
    other = replace(tiny_base, ref=replace(tiny_base.ref, id="tests/renamed"))
    digests: list[str] = []
    with recorded(tmp_path / "disk") as recording:
        for base in (tiny_base, other):  # the second changes the config under the first's manifest
            digests.append(pack(folder, base=base).digest)
            recording.acknowledge(digests[-1])
    recording.check_order()
    for acknowledged, found in recording.crashes(tmp_path / "after", draws=1):
        try:
            digest = open_adapter(found / "p").digest
        except InvalidManifest as error:
            assert "has no adapterhub.json" in str(error)
            assert len(acknowledged) < 2
        else:
            assert digest in digests[max(len(acknowledged) - 1, 0) :]


def test_two_that_adopt_one_adapter_get_one_digest(
    tmp_path: Path, tiny_base: StoredBase, peft_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their processors round otherwise, so their probes differ."""
    first = pack(shutil.copytree(peft_folder, tmp_path / "1"), base=tiny_base, name="ada")
    recorded_answers = probe.record

    def rounded(loaded: Any, folder: Path, **options: Any) -> Probe:
        found = recorded_answers(loaded, folder, **options)
        answers = [one.model_copy(update={"gaps": [gap + 1e-4 for gap in one.gaps]}) for one in found.answers]
        return found.model_copy(update={"answers": answers})

    monkeypatch.setattr(probe, "record", rounded)
    second = pack(shutil.copytree(peft_folder, tmp_path / "2"), base=tiny_base, name="bob", license="mit")
    assert first.probe != second.probe
    assert first.digest == second.digest
    assert first.manifest.probe is None


def test_packing_again_removes_a_signature_that_no_longer_holds(
    tmp_path: Path, tiny_base: StoredBase, peft_folder: Path
) -> None:
    folder, said = shutil.copytree(peft_folder, tmp_path / "p"), list[str]()
    sign(pack(folder, base=tiny_base), make_key(tmp_path / "key")[0])
    assert signer_hint(pack(folder, base=tiny_base)) is not None  # nothing changed
    assert signer_hint(pack(folder, base=tiny_base, stop=["###"], report=said.append)) is None
    assert "adapter.sig removed: it was of the package before" in said
