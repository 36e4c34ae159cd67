from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_operations import recorded

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
