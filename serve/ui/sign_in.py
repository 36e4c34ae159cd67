"""Sign-in to the page with a key of the API, kept in a cookie that no script can read."""

from __future__ import annotations

import time
from urllib.parse import parse_qs

import gradio as gr
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.errors import AdapterHubError
from serve.ui.client import PageClient
from serve.ui.render.templates import render

COOKIE = "adapterhub_key"
_TRUSTED_S = 30.0
"""Time for which an accepted key opens the page without a new check, in seconds. The API checks each request."""
_MAX_FORM_BYTES = 4096


def key_of(request: gr.Request) -> str | None:
    """Return the visitor's API key, which is sent with each request to the API."""
    key = request.cookies.get(COOKIE)
    return str(key) if key else None


class Gate:
    """Middleware that passes requests below `path` with an accepted key, shows the sign-in form, refuses the rest."""

    def __init__(self, app: ASGIApp, *, path: str, client: PageClient) -> None:
        self._app = app
        self._path = path
        self._client = client
        self._trusted: dict[str, float] = {}
        """Accepted key -> time on the monotonic clock until which it is trusted, in seconds."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and (scope["path"] + "/").startswith(f"{self._path}/")
        reply = await self._instead(Request(scope, receive)) if is_page else None
        await (reply or self._app)(scope, receive, send)

    async def _instead(self, request: Request) -> Response | None:
        """Return the reply to send instead of the page, or None for the page itself."""
        if request.url.path == f"{self._path}/sign-in" and request.method == "POST":
            return await self._sign_in(request)
        if request.url.path == f"{self._path}/sign-out":
            reply = RedirectResponse(self._path, status_code=303)
            reply.delete_cookie(COOKIE, path=self._path)
            return reply
        try:
            if await self._is_let_in(request.cookies.get(COOKIE)):
                return None
        except AdapterHubError as error:
            return HTMLResponse(_form(str(error), request.url.query, self._path), status_code=503)
        if request.method == "GET" and request.url.path in (self._path, f"{self._path}/"):
            return HTMLResponse(_form(None, request.url.query, self._path), status_code=401)
        return JSONResponse({"detail": "no accepted API key: sign in at the page first."}, status_code=401)

    async def _sign_in(self, request: Request) -> Response:
        if int(request.headers.get("content-length", _MAX_FORM_BYTES + 1)) > _MAX_FORM_BYTES:
            return JSONResponse(
                {"detail": f"the form is larger than {_MAX_FORM_BYTES} bytes: send the key alone."}, status_code=413
            )
        fields = parse_qs((await request.body()).decode(errors="replace"))
        key, query = fields.get("key", [""])[0].strip(), fields.get("query", [""])[0]
        try:
            is_let_in = await self._is_let_in(key)
        except AdapterHubError as error:
            return HTMLResponse(_form(str(error), query, self._path), status_code=503)
        if not is_let_in:
            return HTMLResponse(_form("The server does not accept this key.", query, self._path), status_code=401)
        reply = RedirectResponse(f"{self._path}?{query}" if query else self._path, status_code=303)
        is_secure = request.url.scheme == "https"
        # Lax: a link from elsewhere may open the page, nothing elsewhere may act through it.
        reply.set_cookie(COOKIE, key, path=self._path, httponly=True, samesite="lax", secure=is_secure)
        return reply

    async def _is_let_in(self, key: str | None) -> bool:
        if not (key and key.isascii() and key.isprintable()):  # a header cannot carry others
            return False
        if self._trusted.get(key, 0.0) > time.monotonic():
            return True
        self._trusted.pop(key, None)
        if not await self._client.lets_in(key):
            return False
        self._trusted[key] = time.monotonic() + _TRUSTED_S
        return True


def _form(message: str | None, query: str, path: str) -> str:
    return render("sign_in", message=message, query=query, path=path)
