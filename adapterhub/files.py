"""Atomic writes, folders in use, user paths and sha256 digests of files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import StorageFull, UsageError
from adapterhub.units import format_bytes

_CHUNK = 1 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def expanded(path: Path | str) -> Path:
    """Replace `~` and `~user` in a path. Raises UsageError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"unknown user in '{path}': write the full path.") from error


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def copy_and_hash(source: Path, target: Path) -> str:
    """Copy a file's bytes to `target` and return their hex sha256. The source is read once."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            write.write(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to a temporary file, flush it to disk and rename it to `path`, so that no reader sees half of it.

    Raises StorageFull when the disk is full; then `path` is unchanged.
    """
    with write_stream_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def write_stream_atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that `write_atomic` would write. An exception in the block leaves `path` unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with raise_storage_full(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Return whether `write_atomic` or `new_folder` made the file, to rename it later. A killed process leaves it."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which is renamed to `path` when the block succeeds and else removed.

    If another process made `path` meanwhile, that one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        with hold(temporary), raise_storage_full(path):
            yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Mark a file or folder as in use while the block runs; `is_held` returns that in every process.

    The mark is a shared lock of the kernel, so it ends with the process. Raises FileNotFoundError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Return whether any process holds `path`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def raise_storage_full(path: Path) -> Iterator[None]:
    """Convert ENOSPC and EDQUOT into StorageFull, with the free space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next(parent for parent in (path, *path.parents) if parent.exists())
        free = format_bytes(shutil.disk_usage(folder).free)
        raise StorageFull(
            f"the disk is full: could not write {path} ({free} free), and no partial file was left. Free "
            "some space, or set ADAPTERHUB_HOME (or the output option) to a folder on another disk."
        ) from error
