"""Streaming of request bodies, as blocks or as lines, so that no body is held in memory as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from adapterhub.hubserver.errors import TooLarge

_BLOCK_BYTES = 1 << 20


async def stream_body(request: Request, write: Callable[[bytes], None]) -> None:
    """Pass the body to `write` in blocks of about 1 MiB, in a thread, while the next block is received.

    Raises ClientDisconnect, and whatever `write` raises.
    """
    writing: asyncio.Future[None] | None = None
    buffer = bytearray()
    try:
        async for chunk in request.stream():
            buffer += chunk
            # Chunks are 64 KiB or less: a thread switch for each would cost more than the write.
            if len(buffer) >= _BLOCK_BYTES:
                if writing is not None:
                    await writing
                writing = asyncio.ensure_future(run_in_threadpool(write, bytes(buffer)))
                buffer.clear()
    finally:
        # Also after a disconnect: the file must not be closed while the thread writes to it.
        if writing is not None:
            await writing
    if buffer:
        await run_in_threadpool(write, bytes(buffer))


async def iter_lines(request: Request, *, max_line_bytes: int) -> AsyncIterator[bytes]:
    """Yield the lines of the body that are not empty. Raises TooLarge for a line above `max_line_bytes`."""
    buffer = bytearray()
    async for chunk in request.stream():
        buffer += chunk
        # Only the new bytes can contain the end of the line.
        if b"\n" in chunk:
            *complete, rest = buffer.split(b"\n")
            buffer = rest
            for line in complete:
                if line.strip():
                    yield bytes(line)
        if len(buffer) > max_line_bytes:
            raise TooLarge(f"a line of the commit exceeds {max_line_bytes} bytes: send larger files by LFS.")
    if buffer.strip():
        yield bytes(buffer)
