"""Atomic and durable writes, folders in use, user paths and sha256 digests of files.

What `write_atomic`, `new_folder`, `make_folder`, `rename_durably` and `link_durably` made survives a power cut once
they return: content is flushed before a name points to it, and the folder that holds the name after.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from adapterhub.errors import StorageFull, UsageError
from adapterhub.units import format_bytes

_CHUNK = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_RUST_ERROR = re.compile(r"\(os error ([0-9]+)\)")
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
    temporary = temporary_beside(path)
    with raise_storage_full(path):
        make_folder(path.parent)
        try:
            with temporary.open("wb") as file:
                yield file
            rename_durably(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; they keep its names in order themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder with everything below it, to disk."""
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            sync_tree(inside)
    if not path.is_symlink():
        sync(path)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents. Their names are on disk when this returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def rename_durably(source: Path, target: Path) -> None:
    """Flush a file or folder with its content, rename it to `target` and flush the folder of `target`."""
    sync_tree(source)
    source.replace(target)
    sync(target.parent)


def link_durably(source: Path, target: Path) -> None:
    """Flush a file, make `target` a hard link to it and flush the folder of `target`. Raises FileExistsError."""
    sync(source)
    os.link(source, target)
    sync(target.parent)


def temporary_beside(path: Path) -> Path:
    """Return a new name beside `path`, for what will be renamed to it (`is_temporary`)."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Return whether `write_atomic` or `new_folder` made the file, to rename it later. A killed process leaves it."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextlib.contextmanager
def new_folder(path: Path, *, holds_synced: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder, which is renamed to `path` when the block succeeds and else removed.

    All files and names are on disk when this returns; `holds_synced`: the files are already, for example as links to
    files that are. If another process made `path` meanwhile, that one stays. Raises StorageFull.
    """
    temporary = temporary_beside(path)
    with raise_storage_full(path):
        make_folder(path.parent)
        temporary.mkdir()
        try:
            with hold(temporary):
                yield temporary
                sync(temporary) if holds_synced else sync_tree(temporary)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync(path.parent)
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
    """Convert ENOSPC and EDQUOT into StorageFull, with the free space; also when a library wraps them."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        folder = next(parent for parent in (path, *path.parents) if parent.exists())
        free = format_bytes(shutil.disk_usage(folder).free)
        raise StorageFull(
            f"the disk is full: could not write {path} ({free} free), and no partial file was left. Free "
            "some space, or set ADAPTERHUB_HOME (or the output option) to a folder on another disk."
        ) from error


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    # It is no OSError; its number is only in its text. The library is loaded if it raised.
    safetensors = sys.modules.get("safetensors")
    found = _RUST_ERROR.search(str(error)) if safetensors and isinstance(error, safetensors.SafetensorError) else None
    return found is not None and int(found[1]) in _DISK_FULL
