"""The bytes of files, named by their content and shared by all repositories. Knows no repository and no rights."""

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

from adapterhub.files import raise_storage_full, sha256_of, write_atomic
from adapterhub.hubserver.errors import StoreBusy, TooLarge, UploadEnded, UploadMismatch
from adapterhub.hubserver.storage.git_ids import blob_id


class Spool:
    """A body on its way to a file that appears whole, or not at all."""

    def __init__(self, target: Path, part: Path, *, max_bytes: int) -> None:
        self._target, self._part, self._max = target, part, max_bytes
        self.size_bytes = 0
        self.file = part.open("x+b")

    def write(self, piece: bytes) -> None:
        """Append bytes. Raises TooLarge, and StorageFull when the disk has no room."""
        self.size_bytes += len(piece)
        if self.size_bytes > self._max:
            raise TooLarge(f"the body is larger than the {self._max} bytes announced or allowed.")
        with raise_storage_full(self._part):
            self.file.write(piece)

    def keep(self) -> None:
        """Make it visible under its name."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        with raise_storage_full(self._part):
            self.file.flush()
            os.fsync(self.file.fileno())
        self._part.replace(self._target)

    def close(self) -> None:
        """Drop what was not kept."""
        # Closing flushes, which fails again on a full disk; the bytes are dropped either way.
        with contextlib.suppress(OSError):
            self.file.close()
        self._part.unlink(missing_ok=True)


class Upload:
    """One large object on its way in; nobody sees it before `finish` has checked its size and sha256."""

    def __init__(self, spool: Spool, *, sha256: str, size_bytes: int) -> None:
        self._spool = spool
        self._sha256, self._size = sha256, size_bytes
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def write(self, piece: bytes) -> None:
        """Append bytes. Raises TooLarge past the announced size, StorageFull when the disk has no room."""
        # Hashing takes about as long as writing, and both leave the interpreter to others.
        hashed = self._hasher.submit(self._digest.update, piece)
        self._spool.write(piece)
        hashed.result()

    def finish(self) -> None:
        """Check what came and make it visible. Raises UploadMismatch; the object is then not stored."""
        came = (self._spool.size_bytes, self._digest.hexdigest())
        if came != (self._size, self._sha256):
            raise UploadMismatch(
                f"the upload has {came[0]} bytes with sha256 {came[1]}; announced were {self._size} bytes with "
                f"sha256 {self._sha256}. Nothing was stored; upload it again."
            )
        self._spool.keep()

    def close(self) -> None:
        """Drop what was not finished."""
        self._hasher.shutdown()
        self._spool.close()


class PartWriter:
    """One part of an object, written where it belongs; parts may come at once and in any order.

    While one is open, the object cannot be finished. Raises UploadEnded, and StoreBusy when it is being finished.
    """

    def __init__(self, path: Path, *, start: int, end: int) -> None:
        self._path, self._at, self._end = path, start, end
        with contextlib.ExitStack() as opened, _missing_is_said():
            self._file = opened.enter_context(path.open("r+b", buffering=0))
            _lock(self._file, fcntl.LOCK_SH)
            # Finished since it was opened: these bytes are everybody's by now.
            path.stat()
            opened.pop_all()
        self._file.seek(start)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, piece: bytes) -> None:
        """Raises TooLarge past the end of the part, StorageFull."""
        self._at += len(piece)
        if self._at > self._end:
            raise TooLarge("the part is larger than announced.")
        with raise_storage_full(self._path):
            while piece:
                piece = piece[self._file.write(piece) :]

    def check_complete(self) -> None:
        """Flush to disk. Raises UploadMismatch for a part that is too short."""
        if self._at != self._end:
            raise UploadMismatch(f"the part lacks {self._end - self._at} bytes; send it again.")
        os.fsync(self._file.fileno())


class ObjectStore:
    """`objects/git/<sha1>` for small files, `objects/lfs/<sha256>` for large ones, below one folder."""

    def __init__(self, root: Path) -> None:
        self.git_folder = root / "objects" / "git"
        self.lfs_folder = root / "objects" / "lfs"
        self._parts = root / "uploads"
        for folder in (self.git_folder, self.lfs_folder, self._parts):
            folder.mkdir(parents=True, exist_ok=True)

    def put_blob(self, data: bytes) -> str:
        """Store a small file, return its git blob id."""
        oid = blob_id(data)
        # Young again: what a commit under way counts on is not removed as unused.
        if not touched(self.blob_path(oid)):
            write_atomic(self.blob_path(oid), data)
        return oid

    def blob_path(self, oid: str) -> Path:
        return self.git_folder / oid

    def touch_lfs(self, sha256: str) -> bool:
        """Whether there is such a large object; it counts as young again."""
        return touched(self.lfs_path(sha256))

    def lfs_path(self, sha256: str) -> Path:
        return self.lfs_folder / sha256

    def begin_upload(self, sha256: str, *, size_bytes: int) -> Upload:
        """Open the way in for one large object; the caller closes it."""
        spool = self.begin_spool(self.lfs_path(sha256), max_bytes=size_bytes)
        return Upload(spool, sha256=sha256, size_bytes=size_bytes)

    def begin_spool(self, target: Path, *, max_bytes: int) -> Spool:
        """Open the way to any other file; the caller closes it."""
        return Spool(target, self._parts / f"{secrets.token_hex(16)}.part", max_bytes=max_bytes)

    def new_parts(self) -> str:
        """Make room for an object that comes in parts; returns the name to say with each."""
        name = secrets.token_hex(16)
        (self._parts / f"{name}.part").touch()
        return name

    def open_part(self, name: str, *, start: int, end: int) -> PartWriter:
        """Write one part, `start` to `end` bytes into the object."""
        return PartWriter(self._parts_path(name), start=start, end=end)

    def finish_parts(self, name: str, *, sha256: str, size_bytes: int) -> None:
        """Check an object whose parts are all here and make it visible.

        Raises UploadMismatch, then all is dropped; UploadEnded; and StoreBusy while a part is still being sent.
        """
        path = self._parts_path(name)
        with _missing_is_said(), path.open("rb") as file:
            _lock(file, fcntl.LOCK_EX)
            came = (path.stat().st_size, sha256_of(path))
            if came != (size_bytes, sha256):
                path.unlink()
                raise UploadMismatch(
                    f"the parts make {came[0]} bytes with sha256 {came[1]}; announced were {size_bytes} bytes with "
                    f"sha256 {sha256}. Nothing was stored; upload it again."
                )
            if self.touch_lfs(sha256):
                path.unlink()
            else:
                path.replace(self.lfs_path(sha256))

    def _parts_path(self, name: str) -> Path:
        return self._parts / f"{name}.part"

    def sweep_uploads(self, *, older_than_s: float) -> None:
        """Remove what uploads of a killed process left behind."""
        limit = time.time() - older_than_s
        for part in self._parts.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_mtime < limit:
                    part.unlink()


def _lock(file: BinaryIO, how: int) -> None:
    """Shared for those who write parts, exclusive for who finishes, until the file is closed. Raises StoreBusy."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreBusy(
            "a part of this upload is still being sent, or it is being finished: wait for that, then try again."
        ) from None


@contextlib.contextmanager
def _missing_is_said() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UploadEnded("this upload was finished or dropped; start it again.") from None


def touched(path: Path) -> bool:
    """Make a file young, so that it is not removed as unused; whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
