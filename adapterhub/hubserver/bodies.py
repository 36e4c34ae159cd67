"""Request bodies as they arrive, in pieces or in lines, so that none is ever held whole. Knows no routes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request

from adapterhub.hubserver.refusals import TooLarge

_PIECE = 1 << 20


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about 1 MiB: a thread switch for each 64 KiB would cost more than the write."""
    held = bytearray()
    async for chunk in request.stream():
        held += chunk
        if len(held) >= _PIECE:
            yield bytes(held)
            held.clear()
    yield bytes(held)


async def lines(request: Request, *, max_line_bytes: int) -> AsyncIterator[bytes]:
    """The lines that are not empty. Raises TooLarge for a longer one."""
    held = bytearray()
    async for chunk in request.stream():
        held += chunk
        # Only the new bytes can hold the end of the line.
        if b"\n" in chunk:
            *complete, rest = held.split(b"\n")
            held = rest
            for line in complete:
                if line.strip():
                    yield bytes(line)
        if len(held) > max_line_bytes:
            raise TooLarge(f"a line of the commit exceeds {max_line_bytes} bytes; send larger ones by LFS.")
    if held.strip():
        yield bytes(held)
