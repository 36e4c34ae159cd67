"""Xorbs on disk, kept a while so that clients need not send the same chunks twice; files rebuilt from them.

Knows no repositories and no HTTP. A xorb lies under the user who sent it, so that nobody can spoil another's by
sending other bytes under its name. What others sent is used only to rebuild a file whose sha256 the asker knows too.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from adapterhub.hubserver.errors import UploadMismatch
from adapterhub.hubserver.storage.objects import ObjectStore, Spool
from adapterhub.hubserver.xet.format import (
    MAX_SHARD_BYTES,
    MAX_XORB_BYTES,
    Chunk,
    ShardFile,
    Term,
    unpacked,
    xorb_chunks,
)

KEPT_S = 30 * 24 * 3600
"""Clients remember for three weeks which chunks they have sent, and fail when those are gone."""
_HASH = re.compile(r"[0-9a-f]{64}")
_PIECE = 1 << 20


class XetStore:
    """`xet/<user>/<hash>` below one folder."""

    def __init__(self, root: Path, objects: ObjectStore) -> None:
        self._xorbs = root / "xet"
        self._objects = objects
        self._chunks = lru_cache(maxsize=64)(_read_chunks)

    def begin_xorb(self, user: str, xorb: str) -> Spool:
        """Open the way in for one xorb; the caller closes it. Raises UploadMismatch for what cannot be a hash."""
        if _HASH.fullmatch(xorb) is None:
            raise UploadMismatch(f"{xorb!r} is not the hash of a xorb.")
        return self._objects.begin_spool(self._xorbs / user / xorb, max_bytes=MAX_XORB_BYTES)

    def begin_shard(self) -> Spool:
        """Open the way in for one shard, which is read once and never kept; the caller closes it."""
        return self._objects.begin_spool(self._xorbs, max_bytes=MAX_SHARD_BYTES)

    def rebuild(self, file: ShardFile, *, user: str) -> None:
        """Put a file together and store it as an object, after checking its sha256.

        Raises UploadMismatch when chunks are missing or make another file.
        """
        with contextlib.closing(self._objects.begin_upload(file.sha256, size_bytes=file.size_bytes)) as upload:
            held = bytearray()
            for term in file.terms:
                for raw in self._raw_chunks(term, user=user):
                    held += raw
                    if len(held) >= _PIECE:
                        upload.write(bytes(held))
                        held.clear()
            upload.write(bytes(held))
            upload.finish()

    def sweep(self, *, older_than_s: float = KEPT_S) -> int:
        """Remove xorbs neither sent nor used for so long; returns their bytes."""
        limit, freed = time.time() - older_than_s, 0
        for path in self._xorbs.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_mtime < limit:
                    path.unlink()
                    freed += status.st_size
        return freed

    def _raw_chunks(self, term: Term, *, user: str) -> Iterator[bytes]:
        path = self._find(term.xorb, user=user)
        chunks = self._chunks(path)
        if not term.first < term.end <= len(chunks):
            raise UploadMismatch(f"the xorb {term.xorb} has {len(chunks)} chunks, not {term.first} to {term.end}.")
        # Used again: kept for longer.
        os.utime(path)
        with path.open("rb") as xorb:
            for chunk in chunks[term.first : term.end]:
                yield _read_chunk(xorb, chunk)

    def _find(self, xorb: str, *, user: str) -> Path:
        own = self._xorbs / user / xorb
        if own.exists():
            return own
        found = next(self._xorbs.glob(f"*/{xorb}"), None)
        if found is None:
            raise UploadMismatch(
                f"the xorb {xorb} is not here (any more). The client believes it sent it before: delete its cache "
                "(~/.cache/huggingface/xet) and upload again."
            )
        return found


def _read_chunks(path: Path) -> list[Chunk]:
    with path.open("rb") as xorb:
        return xorb_chunks(xorb)


def _read_chunk(xorb: BinaryIO, chunk: Chunk) -> bytes:
    xorb.seek(chunk.start)
    return unpacked(chunk, xorb.read(chunk.packed_size))
