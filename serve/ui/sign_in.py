"""Who may open the page: the API's own keys, kept in a cookie that no script can read. Asks the API, knows no key."""

from __future__ import annotations

import html
import time
from urllib.parse import parse_qs

import gradio as gr
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.errors import AdapterHubError
from serve.ui.client import PageClient

COOKIE = "adapterhub_key"
_TRUSTED_S = 30.0
"""how long a key that the API took opens the page without asking again; what the key may do is asked each time"""
_LONGEST_FORM = 4096


def key_of(request: gr.Request) -> str | None:
    """The visitor's API key, which goes along with each request to the API."""
    key = request.cookies.get(COOKIE)
    return str(key) if key else None


class Gate:
    """Lets requests below `path` through that carry a key the API takes; asks a person for one, refuses the rest."""

    def __init__(self, app: ASGIApp, *, path: str, client: PageClient) -> None:
        self._app = app
        self._path = path
        self._client = client
        self._trusted: dict[str, float] = {}
        """keys the API took -> until when; as many at most as there are keys"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and (scope["path"] + "/").startswith(f"{self._path}/")
        reply = await self._instead(Request(scope, receive)) if is_page else None
        await (reply or self._app)(scope, receive, send)

    async def _instead(self, request: Request) -> Response | None:
        """What is sent instead of the page, or None for the page itself."""
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
        return JSONResponse({"detail": "sign in with an API key first"}, status_code=401)

    async def _sign_in(self, request: Request) -> Response:
        if int(request.headers.get("content-length", _LONGEST_FORM + 1)) > _LONGEST_FORM:
            return JSONResponse({"detail": "too long"}, status_code=413)
        fields = parse_qs((await request.body()).decode(errors="replace"))
        key, query = fields.get("key", [""])[0].strip(), fields.get("query", [""])[0]
        try:
            is_let_in = await self._is_let_in(key)
        except AdapterHubError as error:
            return HTMLResponse(_form(str(error), query, self._path), status_code=503)
        if not is_let_in:
            return HTMLResponse(_form("The server does not take this key.", query, self._path), status_code=401)
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


def _form(said: str | None, query: str, path: str) -> str:
    trouble = f'<p role="alert">{html.escape(said)}</p>' if said else ""
    return _PAGE.format(trouble=trouble, query=html.escape(query), path=path)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>adapterhub · sign in</title><style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ display: grid; place-items: center; min-height: 90dvh; margin: 0 16px; }}
main {{ width: 100%; max-width: 340px; }}
h1 {{ font-size: 1.35rem; }}
input, button {{ box-sizing: border-box; width: 100%; padding: 11px 14px; font: inherit; border-radius: 8px; }}
input {{ border: 1px solid #64748b; margin: 6px 0 12px; }}
button {{ border: 0; background: #0f766e; color: white; cursor: pointer; }}
[role=alert] {{ color: light-dark(#b91c1c, #fca5a5); }}
</style></head><body><main><h1>adapterhub</h1>
<form method="post" action="{path}/sign-in">
<label>API key<input name="key" type="password" autocomplete="current-password" autofocus required></label>
<input type="hidden" name="query" value="{query}">{trouble}<button>Sign in</button>
</form></main></body></html>
"""
