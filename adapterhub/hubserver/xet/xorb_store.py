"""Xorbs on disk, which clients do not need to send again, and files that are rebuilt from them.

A xorb is stored under the user who sent it, and files are rebuilt from that user's xorbs only: whoever knows the name
of another's xorb can neither read nor replace its chunks.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from adapterhub.hubserver.errors import UploadMismatch
from adapterhub.hubserver.storage.objects import ObjectStore, Spool, touch_if_exists
from adapterhub.hubserver.xet.format import (
    MAX_SHARD_BYTES,
    MAX_XORB_BYTES,
    ShardFile,
    Term,
    XorbChunk,
    unpack,
    xorb_chunks,
)

XORB_LIFETIME_S = 30 * 24 * 3600
"""How long unused xorbs are stored, in seconds: clients cache for three weeks which chunks they have sent."""
_HASH = re.compile(r"[0-9a-f]{64}")
_BLOCK_BYTES = 1 << 20


class XorbStore:
    """The xorbs below one folder: `xet/<user>/<hash>`."""

    def __init__(self, root: Path, objects: ObjectStore) -> None:
        self._xorbs = root / "xet"
        self._objects = objects

    def begin_xorb(self, user: str, xorb: str) -> Spool:
        """Open a temporary file for a xorb; the caller closes it. Raises UploadMismatch for an invalid hash."""
        if _HASH.fullmatch(xorb) is None:
            raise UploadMismatch(f"invalid hash {xorb!r} of a xorb: expected 64 hex digits.")
        return self._objects.open_spool(self._xorbs / user / xorb, max_bytes=MAX_XORB_BYTES)

    def begin_shard(self) -> Spool:
        """Open a temporary file for a shard, which is parsed and not stored; the caller closes it."""
        return self._objects.open_spool(self._xorbs, max_bytes=MAX_SHARD_BYTES)

    def rebuild(self, file: ShardFile, *, user: str) -> None:
        """Rebuild a file from its chunks, check its sha256 and store it as an object.

        Raises UploadMismatch if chunks are missing or the sha256 differs.
        """
        # For this file only: a xorb can be sent again, packed otherwise.
        positions = lru_cache(maxsize=8)(_read_chunks)
        with contextlib.closing(self._objects.begin_upload(file.sha256, size_bytes=file.size_bytes)) as upload:
            buffer = bytearray()
            for term in file.terms:
                for raw in _raw_chunks(self._find(term.xorb, user=user), term, positions):
                    buffer += raw
                    if len(buffer) >= _BLOCK_BYTES:
                        upload.write(bytes(buffer))
                        buffer.clear()
            upload.write(bytes(buffer))
            upload.finish()

    def remove_unused(self, *, older_than_s: float = XORB_LIFETIME_S) -> int:
        """Delete xorbs that were last sent or used longer ago than `older_than_s`. Return their size in bytes."""
        limit, freed = time.time() - older_than_s, 0
        for path in self._xorbs.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_mtime < limit:
                    path.unlink()
                    freed += status.st_size
        return freed

    def _find(self, xorb: str, *, user: str) -> Path:
        path = self._xorbs / user / xorb
        # Reset its age: the xorb is in use.
        if not touch_if_exists(path):
            raise UploadMismatch(
                f"the xorb {xorb} of '{user}' is not on this hub (any more), but the client's cache lists it as sent: "
                "delete the cache (~/.cache/huggingface/xet) and upload again."
            )
        return path


def _raw_chunks(path: Path, term: Term, positions: Callable[[Path], list[XorbChunk]]) -> Iterator[bytes]:
    chunks = positions(path)
    if not term.first < term.end <= len(chunks):
        raise UploadMismatch(
            f"the xorb {term.xorb} has {len(chunks)} chunks: the shard refers to chunks {term.first} to {term.end}."
        )
    with path.open("rb") as xorb:
        for chunk in chunks[term.first : term.end]:
            yield _read_chunk(xorb, chunk)


def _read_chunks(path: Path) -> list[XorbChunk]:
    with path.open("rb") as xorb:
        return xorb_chunks(xorb)


def _read_chunk(xorb: BinaryIO, chunk: XorbChunk) -> bytes:
    xorb.seek(chunk.start)
    return unpack(chunk, xorb.read(chunk.packed_size))
