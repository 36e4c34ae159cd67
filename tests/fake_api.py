"""A small API that answers as it is told to, with the page before it: for the ways a server can fail a chat.

The last question decides: "404", "500", "500 once", "drop", "error event", "slow" (without end) or anything else, which
is repeated after the model's name, word by word. As a program it serves two: one open, one that wants the key `KEY`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

KEY = "open sesame"
FIRST_TOKEN_S = 0.1
"""seconds before an answer or a refusal: a page that never shows its waiting state is no test of it"""
TOKEN_S = 0.02
"""seconds between two words of an answer"""

_BASE = {"id": "tiny-base", "object": "model", "created": 1, "owned_by": "tests", "parent": None, "root": "tests/tiny"}
_ADAPTER = {
    "object": "model",
    "created": 1,
    "owned_by": "tests",
    "parent": "tiny-base",
    "digest": "sha256:" + "0123456789abcdef" * 4,
    "lora": {"method": "lora", "rank": 8, "alpha": 16.0},
    "licence": "apache-2.0",
    "evaluations": [{"data": "sea_tales", "tokens": 900, "base_loss": 3.21, "adapter_loss": 1.09}],
}
MODELS = [_BASE, {**_ADAPTER, "id": "captain"}, {**_ADAPTER, "id": "trivia", "licence": "![](http://evil.test/x.png)"}]


@dataclass(frozen=True)
class FakeApi:
    """The running pair, seen from a test."""

    url: str
    keyed_url: str

    def requests(self) -> list[dict[str, Any]]:
        """Each: `body` as sent, `sent` words, `is_cancelled` if the client left before the end."""
        return list(self._call("GET"))

    def forget(self) -> None:
        self._call("DELETE")

    def _call(self, method: str) -> Any:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/fake/requests", method=method)) as reply:
            return json.load(reply)


@contextlib.contextmanager
def start_fake_api(*, page: bool) -> Iterator[FakeApi]:
    """Both servers in one child process, until the block ends. `page`: mount the browser page (seconds to import)."""
    command = [sys.executable, __file__, *(["--page"] if page else [])]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as child:
        try:
            assert child.stdout is not None
            urls = child.stdout.readline().split()
            assert len(urls) == 2, "the fake API did not start; what it says is above"
            yield FakeApi(*urls)
        finally:
            child.kill()


def create_fake(key: str | None) -> FastAPI:
    app = FastAPI()
    seen: list[dict[str, Any]] = []

    def refusal(request: Request) -> Response | None:
        if key is None or request.headers.get("authorization") == f"Bearer {key}":
            return None
        return _error(401, "invalid_api_key", "the API key is missing or wrong.")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return refusal(request) or JSONResponse({"object": "list", "data": MODELS})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        found = next((model for model in MODELS if model["id"] == name), None)
        return JSONResponse(found) if found else _no_model(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if refused := refusal(request):
            return refused
        body = await request.json()
        question = body["messages"][-1]["content"]
        asked_before = any(entry["body"]["messages"][-1]["content"] == question for entry in seen)
        entry = {"body": body, "sent": 0, "is_cancelled": False}
        seen.append(entry)
        await asyncio.sleep(FIRST_TOKEN_S)
        if question == "404":
            return _no_model(body["model"])
        if question == "500" or (question == "500 once" and not asked_before):
            return _error(500, "internal_error", "the server failed unexpectedly; its log says more.")
        return StreamingResponse(_answer(entry, body["model"], question), media_type="text/event-stream")

    @app.get("/fake/requests")
    async def requests() -> Response:
        return JSONResponse(seen)

    @app.delete("/fake/requests")
    async def forget() -> Response:
        seen.clear()
        return JSONResponse([])

    return app


async def _answer(entry: dict[str, Any], model: str, question: str) -> AsyncIterator[str]:
    words = f"{model} says: {question}".split(" ")
    if question == "slow":
        words += [f"and {at}" for at in range(10_000)]
    try:
        for word in words:
            gap = " " if entry["sent"] else ""
            yield _event({"choices": [{"index": 0, "delta": {"content": gap + word}}]})
            entry["sent"] += 1
            await asyncio.sleep(TOKEN_S)
    except (asyncio.CancelledError, GeneratorExit):
        entry["is_cancelled"] = True
        raise
    if question == "drop":
        raise ConnectionResetError  # the response breaks off in mid-chunk
    if question == "error event":
        yield _event({"error": {"message": "the engine stopped.", "code": "engine_stopped", "type": "server_error"}})
    else:
        usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(said: dict[str, Any]) -> str:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    return f"data: {json.dumps(said if 'error' in said else head | said)}\n\n"


def _no_model(name: str) -> Response:
    return _error(404, "model_not_found", f"the model {name!r} does not exist here; nearest: captain.")


def _error(status: int, code: str, message: str) -> Response:
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
    return JSONResponse(body, status_code=status, headers={"x-should-retry": "false"})


async def _serve_both(*, page: bool) -> None:
    servers = []
    for key in (None, KEY):
        app = create_fake(key)
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if page:
            from serve.ui import mount_page

            mount_page(app, url, needs_key=key is not None)
        servers.append((uvicorn.Server(uvicorn.Config(app, log_level="critical")), listener, url))
    print(*(url for _, _, url in servers), flush=True)
    await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener, _ in servers))


if __name__ == "__main__":
    asyncio.run(_serve_both(page="--page" in sys.argv))
