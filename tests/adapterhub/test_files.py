from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from adapterhub.errors import StorageFull, UsageError
from adapterhub.files import expanded, new_folder, raise_storage_full, sha256_of, write_atomic


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
