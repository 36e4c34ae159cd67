"""The browser page at /ui: a client of the HTTP API like any other. It holds no model and knows no engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.chat_client import PageClient
from serve.page_chat import chat_tab
from serve.page_style import CONTENT_POLICY, CSS, HEAD, ICON, theme

PAGE_PATH = "/ui"
MAX_WAITING = 256
"""events queued in the page's server; beyond that a visitor is told that it is busy"""

_Tab = Callable[[Any, PageClient, Any], None]
_TABS: tuple[tuple[str, _Tab], ...] = (("Chat", chat_tab),)
"""(label, what draws it inside its gr.Tab and connects it)"""


def mount_page(app: FastAPI, api_url: str, *, needs_key: bool) -> None:
    """Serve the page at /ui; it talks to the API at `api_url` like any other client.

    With `needs_key` it asks the visitor for an API key, which stays in the page and goes along with each request.
    """
    blocks = build_page(PageClient(api_url), needs_key=needs_key)
    # Gradio leaves CORS alone where the parent has a policy; by itself it would let every origin in, with cookies.
    app.add_middleware(CORSMiddleware, allow_origins=())
    app.add_middleware(_ContentPolicy)

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
        footer_links=[],
    )


def build_page(client: PageClient, *, needs_key: bool) -> gr.Blocks:
    """The page, not yet mounted."""
    with gr.Blocks(title="adapterhub", analytics_enabled=False) as blocks:
        with gr.Row(elem_classes="top", equal_height=True):
            gr.Markdown("# adapterhub", elem_id="title")
            key = gr.Textbox(
                label="API key",
                show_label=False,
                container=False,
                placeholder="API key",
                type="password",
                elem_id="api-key",
                visible=needs_key,
            )
        with gr.Tabs():
            for label, draw in _TABS:
                with gr.Tab(label):
                    draw(blocks, client, key)
    blocks.queue(max_size=MAX_WAITING)
    return blocks


class _ContentPolicy:
    """Tells the browser what the page may load, whatever an answer or a card contains."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = CONTENT_POLICY
            await send(message)

        is_page = scope["type"] == "http" and scope["path"].startswith(PAGE_PATH)
        await self._app(scope, receive, send_with_policy if is_page else send)
