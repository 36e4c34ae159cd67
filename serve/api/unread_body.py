"""Closes connections whose response came before the body was read, so that the client still receives it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_BYTES = 64 << 20
"""Bytes read and dropped after the response, at most."""
LINGER_S = 5.0
"""Time of reading after the response, in seconds: closed at once, a client that still sends would lose the response."""


class UnreadBody:
    """Middleware that responds at once, then reads and drops what the client still sends, and closes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        is_read = is_closing = can_linger = False

        async def watched_receive() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def closing_send(message: Message) -> None:
            nonlocal is_closing, can_linger
            if message["type"] == "http.response.start" and not is_read:
                is_closing = True
                response = MutableHeaders(scope=message)
                response["connection"] = "close"
                # A client that expects 100 has sent nothing; one that reads to the end of the connection cannot wait.
                can_linger = "expect" not in headers and "content-length" in response
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not (is_closing and can_linger and is_last):
                await send(message)
                return
            await send({**message, "more_body": True})
            await _drain(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, watched_receive, closing_send)


async def _drain(receive: Receive) -> None:
    left, has_more = LINGER_BYTES, True
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while has_more and left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                has_more = message.get("more_body", False)
