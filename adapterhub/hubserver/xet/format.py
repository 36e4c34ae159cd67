"""Parsers of the Xet formats: xorbs (packed chunks) and shards (files as lists of chunks), from untrusted input.

Formats: the Xet protocol specification, huggingface.co/docs/xet, "Xorb Format" and "Shard Format".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import lz4.frame

from adapterhub.hubserver.errors import UploadMismatch

MAX_XORB_BYTES = (64 << 20) + (1 << 20)
"""Largest xorb, in bytes: 64 MiB of chunks, plus what compression may add."""
MAX_SHARD_BYTES = 64 << 20
_MAX_CHUNK = 128 << 10
_MAX_CHUNKS = 8 << 10
_CHUNK_HEADER = 8
_FOOTER_MARK = b"XETBLOB"
_ENTRY = 48
_SHARD_MARK = b"HFRepoMetaData\0"
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30
_PLAIN, _LZ4, _GROUPED_LZ4 = 0, 1, 2


@dataclass(frozen=True)
class XorbChunk:
    """The position of one chunk in a xorb, and its compression scheme."""

    start: int
    packed_size: int
    scheme: int
    raw_size: int
    """Size after decompression, in bytes."""


@dataclass(frozen=True)
class Term:
    """A range of chunks of one xorb."""

    xorb: str
    first: int
    end: int
    """Index after the last chunk."""
    size_bytes: int
    """Size of the range after decompression, in bytes."""


@dataclass(frozen=True)
class ShardFile:
    """A file as a sequence of terms."""

    sha256: str
    terms: tuple[Term, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the file, in bytes."""
        return sum(term.size_bytes for term in self.terms)


def xorb_chunks(xorb: BinaryIO) -> list[XorbChunk]:
    """Return the chunks of a xorb, in order. Raises UploadMismatch if it is not a valid xorb."""
    chunks: list[XorbChunk] = []
    position = xorb.seek(0)
    size = xorb.seek(0, 2)
    while position < size:
        xorb.seek(position)
        header = xorb.read(_CHUNK_HEADER)
        if header.startswith(_FOOTER_MARK):
            break
        if len(header) < _CHUNK_HEADER:
            raise UploadMismatch(f"the xorb ends inside the header of chunk {len(chunks)}.")
        chunk = XorbChunk(
            start=position + _CHUNK_HEADER,
            packed_size=int.from_bytes(header[1:4], "little"),
            scheme=header[4],
            raw_size=int.from_bytes(header[5:8], "little"),
        )
        position = chunk.start + chunk.packed_size
        if header[0] != 0 or chunk.scheme not in (_PLAIN, _LZ4, _GROUPED_LZ4) or chunk.raw_size > _MAX_CHUNK:
            raise UploadMismatch(f"chunk {len(chunks)} of the xorb has an unknown header ({header.hex()}).")
        if position > size or len(chunks) == _MAX_CHUNKS:
            raise UploadMismatch(f"chunk {len(chunks)} is beyond the end of the xorb, or the xorb has too many chunks.")
        chunks.append(chunk)
    if not chunks:
        raise UploadMismatch("the xorb has no chunks: expected at least one.")
    return chunks


def unpack(chunk: XorbChunk, packed: bytes) -> bytes:
    """Return the decompressed bytes of a chunk, at most as many as its header announced. Raises UploadMismatch."""
    raw = packed if chunk.scheme == _PLAIN else _unpack_lz4(packed, limit=chunk.raw_size)
    if len(raw) != chunk.raw_size:
        raise UploadMismatch(f"a chunk unpacks to {len(raw)} bytes: expected {chunk.raw_size}, as announced.")
    return _ungroup(raw) if chunk.scheme == _GROUPED_LZ4 else raw


def _unpack_lz4(packed: bytes, *, limit: int) -> bytes:
    unpacker = lz4.frame.LZ4FrameDecompressor()
    try:
        raw: bytes = unpacker.decompress(packed, max_length=limit)
        # After the last byte of data, the end mark may still be unread.
        more = b"" if unpacker.eof else unpacker.decompress(b"", max_length=1)
    except RuntimeError as error:
        raise UploadMismatch(f"a chunk is not an LZ4 frame: {error}") from None
    return raw + more


def _ungroup(grouped: bytes) -> bytes:
    """Undo byte grouping: the bytes at offsets 0, 4, 8 ... come first, then those at 1, 5, 9 ..., and so on."""
    raw = bytearray(len(grouped))
    start = 0
    for place in range(4):
        end = start + len(range(place, len(grouped), 4))
        raw[place::4] = grouped[start:end]
        start = end
    return bytes(raw)


def hash_text(raw: bytes) -> str:
    """Return a 32-byte hash in Xet's notation: four little-endian 64-bit numbers in hex."""
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", raw))


def shard_files(shard: BinaryIO) -> Iterator[ShardFile]:
    """Yield the files that a shard describes. Raises UploadMismatch for an invalid shard, or a file without sha256."""
    head = shard.read(_ENTRY)
    if len(head) < _ENTRY or not head.startswith(_SHARD_MARK):
        raise UploadMismatch("the body is not a Xet shard: its first bytes are not those of a shard.")
    while (start := _entry(shard))[:32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", start, 32)
        terms = tuple(_term(_entry(shard)) for _ in range(count))
        if flags & _HAS_VERIFICATION:
            for _ in range(count):
                _entry(shard)
        if not flags & _HAS_SHA256:
            raise UploadMismatch("a file in the shard has no sha256: update the client (hf_xet).")
        yield ShardFile(sha256=hash_text(_entry(shard)[:32]), terms=terms)


def _entry(shard: BinaryIO) -> bytes:
    entry = shard.read(_ENTRY)
    if len(entry) < _ENTRY:
        raise UploadMismatch("the shard ends in the middle of an entry: send it again.")
    return entry


def _term(entry: bytes) -> Term:
    _, size_bytes, first, end = struct.unpack_from("<4I", entry, 32)
    return Term(hash_text(entry[:32]), first, end, size_bytes)
