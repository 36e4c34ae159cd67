"""The audit log: one line for each request that can change something."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class AuditLog:
    """An append-only file of JSON lines: time, user, method, path and status of each request.

    A line is one write, so several processes can share the file. The path is recorded without its query string, which
    contains signatures.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, *, user: str | None, method: str, path: str, status: int) -> None:
        """Append a line. `user` is None for a request without a token or with a signed URL."""
        line = json.dumps(
            {"time": round(time.time(), 3), "user": user, "method": method, "path": path, "status": status}
        )
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode() + b"\n")
        finally:
            os.close(file)


class AuditMiddleware:
    """Middleware that records each request that can change something; the routes put the user in the request state."""

    def __init__(self, app: ASGIApp, log: AuditLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READS:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        path = scope["raw_path"].decode("ascii", "replace")
        is_recorded = False

        def record(status: int) -> None:
            nonlocal is_recorded
            is_recorded = True
            self._log.add(user=state.get("user"), method=scope["method"], path=path, status=status)

        async def send_recorded(message: Message) -> None:
            # Before the response is sent, so that the log has every change that was confirmed.
            if message["type"] == "http.response.start":
                record(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except BaseException:
            # A request that failed or was cancelled may have changed something. The client, if any, receives 500.
            if not is_recorded:
                record(500)
            raise
