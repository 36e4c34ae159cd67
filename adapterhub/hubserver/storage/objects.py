"""Content-addressed storage of file contents, shared by all repositories, and uploads to it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from adapterhub.files import make_folder, raise_storage_full, sha256_of, sync, temporary_beside
from adapterhub.hubserver.errors import StoreBusy, TooLarge, UploadGone, UploadMismatch
from adapterhub.hubserver.storage.git_ids import blob_id


class Spool:
    """A temporary file for a request body, which becomes visible only as a whole."""

    def __init__(self, target: Path, part: Path, *, max_bytes: int) -> None:
        self._target, self._part, self._max = target, part, max_bytes
        self.size_bytes = 0
        self.file = part.open("x+b")

    def write(self, block: bytes) -> None:
        """Append bytes. Raises TooLarge, and StorageFull if the disk is full."""
        self.size_bytes += len(block)
        if self.size_bytes > self._max:
            raise TooLarge(f"the body is larger than the {self._max} bytes announced or allowed.")
        with raise_storage_full(self._part):
            self.file.write(block)

    def publish(self) -> None:
        """Move the file to its target, where it becomes visible, and flush both to disk."""
        make_folder(self._target.parent)
        with raise_storage_full(self._part):
            self.file.flush()
            os.fsync(self.file.fileno())
        self._part.replace(self._target)
        sync(self._target.parent)

    def close(self) -> None:
        """Delete the file unless it was published."""
        # Closing flushes, which fails again on a full disk; the bytes are deleted either way.
        with contextlib.suppress(OSError):
            self.file.close()
        self._part.unlink(missing_ok=True)


class Upload:
    """An upload of one large object, which becomes visible after `finish` has checked its size and sha256."""

    def __init__(self, spool: Spool, *, sha256: str, size_bytes: int) -> None:
        self._spool = spool
        self._sha256, self._size = sha256, size_bytes
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def write(self, block: bytes) -> None:
        """Append bytes. Raises TooLarge beyond the announced size, StorageFull if the disk is full."""
        # Hashing takes about as long as writing, and both release the GIL.
        hashed = self._hasher.submit(self._digest.update, block)
        self._spool.write(block)
        hashed.result()

    def finish(self) -> None:
        """Check size and sha256 and publish the object. Raises UploadMismatch, and stores nothing then."""
        received = (self._spool.size_bytes, self._digest.hexdigest())
        if received != (self._size, self._sha256):
            raise UploadMismatch(
                f"the upload has {received[0]} bytes that are not those announced: expected {self._size} bytes with "
                f"sha256 {self._sha256}. Nothing was stored; upload it again."
            )
        self._spool.publish()

    def close(self) -> None:
        """Delete the upload unless it was finished."""
        self._hasher.shutdown()
        self._spool.close()


class PartWriter:
    """Writes one part of an object at its offset; parts can be written in parallel and in any order.

    While a part is open, the object cannot be finished. Raises UploadGone, and StoreBusy while the object is being
    finished.
    """

    def __init__(self, path: Path, *, start: int, end: int) -> None:
        self._path, self._at, self._end = path, start, end
        with contextlib.ExitStack() as opened, _raise_upload_gone():
            self._file = opened.enter_context(path.open("r+b", buffering=0))
            _lock(self._file, fcntl.LOCK_SH)
            # Fails if the object was finished after the file was opened: its bytes are shared now.
            path.stat()
            opened.pop_all()
        self._file.seek(start)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, block: bytes) -> None:
        """Append bytes. Raises TooLarge beyond the end of the part, StorageFull if the disk is full."""
        self._at += len(block)
        if self._at > self._end:
            raise TooLarge("the part is larger than announced: send exactly the announced bytes.")
        with raise_storage_full(self._path):
            while block:
                block = block[self._file.write(block) :]

    def check_complete(self) -> None:
        """Flush the part to disk. Raises UploadMismatch if it is too short."""
        if self._at != self._end:
            raise UploadMismatch(f"the part is {self._end - self._at} bytes too short: send it again.")
        os.fsync(self._file.fileno())


class ObjectStore:
    """File contents below one folder: small files in `objects/git/<sha1>`, large ones in `objects/lfs/<sha256>`."""

    def __init__(self, root: Path) -> None:
        self.git_folder = root / "objects" / "git"
        self.lfs_folder = root / "objects" / "lfs"
        self._parts = root / "uploads"
        for folder in (self.git_folder, self.lfs_folder, self._parts):
            make_folder(folder)

    def put_blob(self, data: bytes) -> str:
        """Store a small file and return its git blob id; `sync` flushes its name, once for many."""
        oid = blob_id(data)
        # Reset the age: garbage collection must not delete a file that a commit in progress needs.
        if not touch_if_exists(self.blob_path(oid)):
            write_synced(self.blob_path(oid), data)
        return oid

    def sync(self) -> None:
        """Flush the names of all objects to disk: before a commit or a mark names one, whoever wrote it."""
        sync(self.git_folder)
        sync(self.lfs_folder)

    def blob_path(self, oid: str) -> Path:
        """Return the path of a small file."""
        return self.git_folder / oid

    def touch_lfs(self, sha256: str) -> bool:
        """Return whether the large object exists, and reset its age for garbage collection."""
        return touch_if_exists(self.lfs_path(sha256))

    def lfs_path(self, sha256: str) -> Path:
        """Return the path of a large object."""
        return self.lfs_folder / sha256

    def begin_upload(self, sha256: str, *, size_bytes: int) -> Upload:
        """Start the upload of one large object; the caller closes it."""
        spool = self.open_spool(self.lfs_path(sha256), max_bytes=size_bytes)
        return Upload(spool, sha256=sha256, size_bytes=size_bytes)

    def open_spool(self, target: Path, *, max_bytes: int) -> Spool:
        """Open a temporary file for `target`; the caller closes it."""
        return Spool(target, self._parts / f"{secrets.token_hex(16)}.part", max_bytes=max_bytes)

    def new_parts(self) -> str:
        """Start an upload in parts and return its name, which each part needs."""
        name = secrets.token_hex(16)
        (self._parts / f"{name}.part").touch()
        return name

    def open_part(self, name: str, *, start: int, end: int) -> PartWriter:
        """Open one part for writing, from byte `start` to byte `end` of the object."""
        return PartWriter(self._parts_path(name), start=start, end=end)

    def finish_parts(self, name: str, *, sha256: str, size_bytes: int) -> None:
        """Check size and sha256 of an object whose parts were all received, and publish it.

        Raises UploadMismatch, and deletes the parts then; UploadGone; StoreBusy while a part is still being received.
        """
        path = self._parts_path(name)
        with _raise_upload_gone(), path.open("rb") as file:
            _lock(file, fcntl.LOCK_EX)
            received = (path.stat().st_size, sha256_of(path))
            if received != (size_bytes, sha256):
                path.unlink()
                raise UploadMismatch(
                    f"the parts have {received[0]} bytes that are not those announced: expected {size_bytes} bytes "
                    f"with sha256 {sha256}. Nothing was stored; upload it again."
                )
            if self.touch_lfs(sha256):
                path.unlink()
            else:
                path.replace(self.lfs_path(sha256))

    def _parts_path(self, name: str) -> Path:
        return self._parts / f"{name}.part"

    def remove_stale_uploads(self, *, older_than_s: float) -> None:
        """Delete the temporary files of uploads that were interrupted longer ago than `older_than_s`."""
        limit = time.time() - older_than_s
        for part in self._parts.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_mtime < limit:
                    part.unlink()


def _lock(file: BinaryIO, how: int) -> None:
    """Lock the file until it is closed: shared to write a part, exclusive to finish. Raises StoreBusy."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreBusy(
            "the upload is locked: a part is still being sent, or it is being finished. Wait, then try again."
        ) from None


@contextlib.contextmanager
def _raise_upload_gone() -> Iterator[None]:
    """Convert FileNotFoundError into UploadGone."""
    try:
        yield
    except FileNotFoundError:
        raise UploadGone("the upload was already finished or dropped: start it again.") from None


def touch_if_exists(path: Path) -> bool:
    """Reset the age of a file, so that garbage collection does not delete it. Return whether the file exists."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def write_synced(path: Path, data: bytes) -> None:
    """Write a file whole and flush its content to disk; the caller flushes its folder, once for many files.

    Raises StorageFull.
    """
    temporary = temporary_beside(path)
    try:
        with raise_storage_full(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
