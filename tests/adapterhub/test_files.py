from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_operations import recorded
from packages import write_manifest, write_package

from adapterhub.errors import StorageFull, UsageError
from adapterhub.files import (
    expanded,
    link_durably,
    make_folder,
    new_folder,
    raise_storage_full,
    rename_durably,
    sha256_of,
    sync,
    write_atomic,
)
from adapterhub.package.bundle import write_bundle
from adapterhub.package.layout import open_adapter


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(data)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 1)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_interrupted_folder_is_never_seen(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_with_what_to_do(number: int, tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match=r"[MG]B free.*ADAPTERHUB_HOME"), raise_storage_full(tmp_path / "deep" / "x"):
        raise OSError(number, "no space")


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), raise_storage_full(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_really_full_disk_leaves_nothing_half_written() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(StorageFull), raise_storage_full(full), full.open("wb", buffering=0) as file:
        file.write(b"x")


def test_a_home_that_nobody_has() -> None:
    with pytest.raises(UsageError, match="unknown user in '~nobody-of-this-name/x': write the full path"):
        expanded("~nobody-of-this-name/x")


def _write(folder: Path) -> None:
    write_atomic(folder / "a" / "b" / "x", "content")


def _replace(folder: Path) -> None:
    write_atomic(folder / "x", "old")
    write_atomic(folder / "x", "new")


def _new_folder(folder: Path) -> None:
    with new_folder(folder / "a" / "out") as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "x").write_text("content")


def _rename(folder: Path) -> None:
    (folder / "x.part").write_text("content")
    rename_durably(folder / "x.part", folder / "x")


def _link(folder: Path) -> None:
    (folder / "x").write_text("content")
    link_durably(folder / "x", folder / "y")


def _make_folder(folder: Path) -> None:
    make_folder(folder / "a" / "b")


DURABLE = [_write, _replace, _new_folder, _rename, _link, _make_folder]


@pytest.mark.parametrize("write", DURABLE)
def test_what_returns_survives_a_power_cut(write: Callable[[Path], None], tmp_path: Path) -> None:
    root = tmp_path / "disk"
    with recorded(root) as recording:
        write(root)
        recording.acknowledge("written")
    recording.check_order()
    whole = _contents(root)
    for told, found in recording.crashes(tmp_path / "after"):
        if told:
            assert whole.items() <= _contents(found).items()


@pytest.mark.parametrize("write", DURABLE[:3])
def test_a_power_cut_shows_no_half_of_a_file_or_folder(write: Callable[[Path], None], tmp_path: Path) -> None:
    root = tmp_path / "disk"
    with recorded(root) as recording:
        write(root)
    for _, found in recording.crashes(tmp_path / "after", draws=4):
        named = {path: text for path, text in _contents(found).items() if "/." not in f"/{path}"}
        assert set(named.values()) <= {"content", "old", "new"}


def test_the_recording_finds_a_name_that_is_not_flushed(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    with recorded(root) as recording:
        (root / "x.part").write_text("content")
        sync(root / "x.part")
        (root / "x.part").rename(root / "x")
        recording.acknowledge("x")
    with pytest.raises(AssertionError, match="x was acknowledged before these names were flushed: ..x"):
        recording.check_order()
    assert any(told and not (found / "x").exists() for told, found in recording.crashes(tmp_path / "after"))


def test_the_recording_finds_content_that_is_not_flushed(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    with recorded(root) as recording:
        (root / "x.part").write_text("content")
        (root / "x.part").rename(root / "x")
        sync(root)
    with pytest.raises(AssertionError, match="rename x: its content was not flushed before"):
        recording.check_order()
    assert any(_contents(found) == {"x": ""} for _, found in recording.crashes(tmp_path / "after"))


def _contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_that_a_library_reports_in_words(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(StorageFull), raise_storage_full(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), raise_storage_full(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")


_WRITERS_ON_A_FULL_DISK = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from adapterhub.errors import StorageFull
from adapterhub.files import new_folder
from adapterhub.package.bundle import write_bundle
from adapterhub.package.layout import open_adapter
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry
from train.loop.run_folder import RunFolder, State

disk, package, bundle = map(Path, sys.argv[1:])
adapter = open_adapter(package)
large = {"x": torch.ones(50_000)}

def convert_base():
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=512)
    with new_folder(disk / "base") as folder:
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)

def save_checkpoint():
    RunFolder(disk / "out", None, None).save(State(step=1), lambda folder: save_file(large, folder / "x"))

writers = {
    "checkpoint": save_checkpoint,
    "pack --output": lambda: pack(package, output=disk / "packed", base=package),
    "add": lambda: Registry(disk / "add").add(adapter),
    "import": lambda: Registry(disk / "import").import_bundle(bundle),
    "export": lambda: write_bundle(adapter, disk / "x.zip"),
    "base": convert_base,
    "probe": lambda: Registry(disk / "probe").record_probe(adapter),
}
told = {}
with (disk / "filler").open("wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
for name, write in writers.items():
    try:
        write()
        told[name] = "nothing"
    except BaseException as error:
        told[name] = type(error).__name__
left = [str(path) for path in disk.rglob("*") if path.is_file() and not path.name.endswith("lock")]
print(json.dumps([told, left]))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_every_writer_says_that_the_disk_is_full_and_leaves_nothing(tmp_path: Path) -> None:
    """A RAM disk in a mount namespace of its own. A pull onto one is in tests/adapterhub/hub/."""
    package = write_package(tmp_path / "p")
    (package / "tokenizer.json").write_text(json.dumps({"padding": "x" * 100_000}))
    write_manifest(package)
    write_bundle(open_adapter(package), tmp_path / "x.zip")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=128k tmpfs {disk} && exec "$@"'
    writes = [sys.executable, "-c", _WRITERS_ON_A_FULL_DISK, str(disk), str(package), str(tmp_path / "x.zip")]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *writes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(f"no small disk can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    told, left = json.loads(done.stdout)
    assert set(told.values()) == {"StorageFull"}, told
    assert left == [str(disk / "filler")]
