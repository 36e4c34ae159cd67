"""Writing that is never seen half-done, folders in use, paths people write, sha256s. Knows nothing of adapters."""

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
    """A path as a person wrote it, `~` and `~name` replaced. Raises UsageError for a name without a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} begins with the home of nobody known here: write the folder's own path.") from error


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def copy_and_hash(source: Path, target: Path) -> str:
    """Copy a file's bytes over `target` and return the sha256 of what was written, in one reading."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            write.write(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` beside `path`, flush it to disk, then rename over it: readers see old or new, never half.

    Raises StorageFull when the disk has no room; `path` is then unchanged.
    """
    with write_stream_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def write_stream_atomic(path: Path) -> Iterator[BinaryIO]:
    """As `write_atomic`, for what is written piece by piece; an exception in the block leaves `path` unchanged."""
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
    """Is it what `write_atomic` or `new_folder` writes to before it renames? A killed process leaves it behind."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; renamed to `path` when the block succeeds, removed when not.

    If another process made `path` in the meantime, theirs stays and ours is dropped.
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
    """Keep a file or folder in use while the block runs: `is_held` says so to every process.

    It is the kernel's shared lock, so it ends with the process, however that ends. Raises FileNotFoundError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Does any process hold `path`?"""
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
    """Turn 'no space left' (also quota) on the way to `path` into StorageFull with the figures."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next(parent for parent in (path, *path.parents) if parent.exists())
        free = format_bytes(shutil.disk_usage(folder).free)
        raise StorageFull(
            f"the disk is full: could not write {path} ({free} free). Free some space, or point "
            "ADAPTERHUB_HOME (or the output option) at another disk; nothing half-written was left."
        ) from error
