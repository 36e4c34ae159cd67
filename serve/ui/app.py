"""The browser page at /ui, a client of the HTTP API."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Callable
from contextlib import suppress

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub.browser_guard import BrowserGuard
from adapterhub.errors import UsageError
from adapterhub.net import is_loopback, listen, url_of
from adapterhub.package.bundle import MAX_BYTES
from serve.config import HttpLimits
from serve.ui.client import PageClient
from serve.ui.script import HEAD
from serve.ui.sign_in import Gate
from serve.ui.style import CONTENT_POLICY, CSS, ICON, theme
from serve.ui.tabs.adapters import AdaptersTab
from serve.ui.tabs.arena import ArenaTab
from serve.ui.tabs.chat import chat_tab
from serve.ui.tabs.compare import CompareTab
from serve.ui.tabs.train import TrainTab

PAGE_PATH = "/ui"
_UPLOAD_PATH = "/gradio_api/upload"
MAX_WAITING = 256
"""Events queued in the page's server; beyond that, visitors see that it is busy."""


def mount_page(app: FastAPI, api_url: str, *, needs_key: bool, max_body_bytes: int = HttpLimits.max_body_bytes) -> None:
    """Serve the page at /ui, as a client of the API at `api_url`.

    With `needs_key` the visitor must first sign in with a key that the API accepts.
    """
    client = PageClient(api_url)
    blocks = build_page(client, needs_key=needs_key)
    # Appended: the application's own guards run first.
    app.user_middleware.append(Middleware(_ContentPolicy))
    if needs_key:
        app.user_middleware.append(Middleware(Gate, path=PAGE_PATH, client=client))
    # Gradio adds no CORS where the parent application has it; its own would allow every origin, with cookies.
    app.user_middleware.append(Middleware(CORSMiddleware, allow_origins=()))
    app.user_middleware.append(Middleware(_BodyLimit, max_bytes=max_body_bytes))

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    gr.mount_gradio_app(
        app,
        blocks,
        PAGE_PATH,
        theme=theme(),
        css=CSS,
        head=HEAD,
        show_error=False,
        run_history=False,
        ssr_mode=False,
        max_file_size=MAX_BYTES,
        footer_links=[],
    )


def build_page(client: PageClient, *, needs_key: bool) -> gr.Blocks:
    """Return the page, not yet mounted."""
    hour_s = 3600
    with gr.Blocks(title="adapterhub", analytics_enabled=False, delete_cache=(hour_s, hour_s)) as blocks:
        with gr.Row(elem_classes="top", equal_height=True):
            gr.Markdown("# adapterhub", elem_id="title")
            if needs_key:
                gr.HTML(f'<a href="{PAGE_PATH}/sign-out">Sign out</a>', elem_id="sign-out", padding=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Chat", id="chat"):
                chat_tab(blocks, client)
            with gr.Tab("Compare", id="compare") as tab:
                compare = CompareTab(client, tab)
            with gr.Tab("Arena", id="arena") as tab:
                ArenaTab(client, tab)
            with gr.Tab("Adapters", id="adapters") as tab:
                AdaptersTab(client, tab)
            with gr.Tab("Train", id="train") as tab:
                TrainTab(client, tab, tabs=tabs, compared=compare.picker)
    blocks.queue(max_size=MAX_WAITING)
    return blocks


def run_page(
    url: str, *, host: str, port: int, allowed_hosts: tuple[str, ...] = (), report: Callable[[str], None]
) -> None:
    """Serve the page alone, for the API at `url`, until SIGINT or SIGTERM.

    Raises ServeError where no server responds, UsageError where other machines would reach an open API, PortBusy.
    """
    _share_arenas()
    api_url = url.rstrip("/").removesuffix("/v1")
    with listen(host, port) as listener:
        asyncio.run(_serve_page(api_url, listener, allowed_hosts, report, is_open=not is_loopback(host)))


def _share_arenas() -> None:
    """Limit glibc to two memory arenas: one per thread leaves much free memory unused (benchmarks/page.py)."""
    arena_max = -8  # malloc.h: M_ARENA_MAX
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(arena_max, 2)


async def _serve_page(
    api_url: str,
    listener: socket.socket,
    allowed_hosts: tuple[str, ...],
    report: Callable[[str], None],
    *,
    is_open: bool,
) -> None:
    needs_key = not await PageClient(api_url).lets_in(None)
    if is_open and not needs_key:
        raise UsageError(
            f"the API at {api_url} asks for no key: a page that other machines can reach needs one. Start the server "
            "with API keys, or serve the page on 127.0.0.1."
        )
    app = FastAPI(openapi_url=None)
    app.add_middleware(
        BrowserGuard,
        is_open=not needs_key,
        allowed_hosts=allowed_hosts,
        refuse=lambda message: JSONResponse({"detail": message}, status_code=403),
    )
    app.get("/", include_in_schema=False)(lambda: RedirectResponse(PAGE_PATH))
    mount_page(app, api_url, needs_key=needs_key)
    report(f"ready: {url_of(listener)}{PAGE_PATH}, before {api_url}/v1")
    await uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).serve([listener])


class _BodyLimit:
    """Middleware that limits request bodies, except uploads: those go to disk and have a limit of their own."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._limited = RequestBodyLimitMiddleware(app, max_body_size=max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_limited = scope["type"] == "http" and scope["path"].startswith(PAGE_PATH)
        if is_limited and scope["path"] != f"{PAGE_PATH}{_UPLOAD_PATH}":
            await self._limited(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _ContentPolicy:
    """Middleware that adds the content security policy, whatever an answer or a card contains."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = CONTENT_POLICY
            await send(message)

        is_page = scope["type"] == "http" and scope["path"].startswith(PAGE_PATH)
        await self._app(scope, receive, send_with_policy if is_page else send)
