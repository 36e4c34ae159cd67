"""Request bodies as they arrive, in pieces or in lines, so that none is ever held whole. Knows no routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from adapterhub.hubserver.errors import TooLarge

_PIECE = 1 << 20


async def pour(request: Request, write: Callable[[bytes], None]) -> None:
    """Hand the body to `write` in pieces of about 1 MiB, in a thread: one is written while the next comes in.

    Raises what `write` raises, and ClientDisconnect.
    """
    writing: asyncio.Future[None] | None = None
    held = bytearray()
    try:
        async for chunk in request.stream():
            held += chunk
            # A thread switch for each 64 KiB would cost more than the write.
            if len(held) >= _PIECE:
                if writing is not None:
                    await writing
                writing = asyncio.ensure_future(run_in_threadpool(write, bytes(held)))
                held.clear()
    finally:
        # Also when the client has gone: nobody may close the file under the thread that writes.
        if writing is not None:
            await writing
    if held:
        await run_in_threadpool(write, bytes(held))


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
