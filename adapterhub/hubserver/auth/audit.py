"""Who changed what, as lines that are only ever added. Knows no routes and no repositories."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class AuditLog:
    """One JSON object for each request that could change something: time, user, method, path, status.

    Only added to, a line in one write, so that several processes may share the file. Addresses are noted without
    their query, which holds signatures.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, *, user: str | None, method: str, path: str, status: int) -> None:
        """`user` None: no token, or a signed address."""
        line = json.dumps(
            {"time": round(time.time(), 3), "user": user, "method": method, "path": path, "status": status}
        )
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode() + b"\n")
        finally:
            os.close(file)


class Audited:
    """Notes each request that could change something as it is answered; who asks is found out by the routes."""

    def __init__(self, app: ASGIApp, log: AuditLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READS:
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        path = scope["raw_path"].decode("ascii", "replace")
        is_noted = False

        def note(status: int) -> None:
            nonlocal is_noted
            is_noted = True
            self._log.add(user=state.get("user"), method=scope["method"], path=path, status=status)

        async def send_noted(message: Message) -> None:
            # Before the answer leaves: what was confirmed is in the log.
            if message["type"] == "http.response.start":
                note(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except BaseException:
            # What failed or was cancelled half-way may have changed something; if anybody still hears, it hears 500.
            if not is_noted:
                note(500)
            raise
