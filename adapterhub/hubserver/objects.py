"""The bytes of files, named by their content and shared by all repositories. Knows no repository and no rights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from pathlib import Path

from adapterhub.files import disk_full_is_said, write_atomic
from adapterhub.hubserver.git_ids import blob_id
from adapterhub.hubserver.refusals import TooLarge, UploadMismatch


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
        with disk_full_is_said(self._part):
            self.file.write(piece)

    def keep(self) -> None:
        """Make it visible under its name."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        with disk_full_is_said(self._part):
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

    def write(self, piece: bytes) -> None:
        """Append bytes. Raises TooLarge past the announced size, StorageFull when the disk has no room."""
        self._spool.write(piece)
        self._digest.update(piece)

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
        self._spool.close()


class ObjectStore:
    """`objects/git/<sha1>` for small files, `objects/lfs/<sha256>` for large ones, below one folder."""

    def __init__(self, root: Path) -> None:
        self._git = root / "objects" / "git"
        self._lfs = root / "objects" / "lfs"
        self._parts = root / "uploads"
        for folder in (self._git, self._lfs, self._parts):
            folder.mkdir(parents=True, exist_ok=True)

    def put_blob(self, data: bytes) -> str:
        """Store a small file, return its git blob id."""
        oid = blob_id(data)
        if not self.blob_path(oid).exists():
            write_atomic(self.blob_path(oid), data)
        return oid

    def blob_path(self, oid: str) -> Path:
        return self._git / oid

    def lfs_path(self, sha256: str) -> Path:
        return self._lfs / sha256

    def begin_upload(self, sha256: str, *, size_bytes: int) -> Upload:
        """Open the way in for one large object; the caller closes it."""
        spool = self.begin_spool(self.lfs_path(sha256), max_bytes=size_bytes)
        return Upload(spool, sha256=sha256, size_bytes=size_bytes)

    def begin_spool(self, target: Path, *, max_bytes: int) -> Spool:
        """Open the way to any other file; the caller closes it."""
        return Spool(target, self._parts / f"{secrets.token_hex(16)}.part", max_bytes=max_bytes)

    def sweep_uploads(self, *, older_than_s: float) -> None:
        """Remove what uploads of a killed process left behind."""
        limit = time.time() - older_than_s
        for part in self._parts.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_mtime < limit:
                    part.unlink()
