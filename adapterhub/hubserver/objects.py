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


class Upload:
    """One large object on its way in; nobody sees it before `finish` has checked its size and sha256."""

    def __init__(self, target: Path, part: Path, *, sha256: str, size_bytes: int) -> None:
        self._target, self._part = target, part
        self._sha256, self._size = sha256, size_bytes
        self._digest = hashlib.sha256()
        self._received = 0
        self._file = part.open("xb")

    def write(self, piece: bytes) -> None:
        """Append bytes. Raises TooLarge past the announced size, StorageFull when the disk has no room."""
        self._received += len(piece)
        if self._received > self._size:
            raise TooLarge(f"the upload is larger than the announced {self._size} bytes.")
        self._digest.update(piece)
        with disk_full_is_said(self._part):
            self._file.write(piece)

    def finish(self) -> None:
        """Check what came and make it visible. Raises UploadMismatch; the object is then not stored."""
        if (self._received, self._digest.hexdigest()) != (self._size, self._sha256):
            raise UploadMismatch(
                f"the upload has {self._received} bytes with sha256 {self._digest.hexdigest()}; announced were "
                f"{self._size} bytes with sha256 {self._sha256}. Nothing was stored; upload it again."
            )
        with disk_full_is_said(self._part):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._part.replace(self._target)

    def close(self) -> None:
        """Drop what was not finished."""
        # Closing flushes, which fails again on a full disk; the bytes are dropped either way.
        with contextlib.suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


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
        part = self._parts / f"{secrets.token_hex(16)}.part"
        return Upload(self.lfs_path(sha256), part, sha256=sha256, size_bytes=size_bytes)

    def sweep_uploads(self, *, older_than_s: float) -> None:
        """Remove what uploads of a killed process left behind."""
        limit = time.time() - older_than_s
        for part in self._parts.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                if part.stat().st_mtime < limit:
                    part.unlink()
