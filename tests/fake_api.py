"""A small API that answers as it is told to, with the page before it: for the ways a server can fail a chat.

The last question decides: "404", "500", "500 once", "drop", "error event", "slow" (minutes), "together" (when four have
asked it), "long" (sixty more words) or anything else, which is repeated after the model's name, word by word;
"blind ..." without the name. As a program it serves two: one open, one that wants the key `KEY`, or `ASKING_KEY`, which
may not manage.
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
from pathlib import Path
from typing import Any

import uvicorn
from fake_extensions import Extensions
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

KEY = "open sesame"
ASKING_KEY = "may I ask"
FIRST_TOKEN_S = 0.1
"""seconds before an answer or a refusal: a page that never shows its waiting state is no test of it"""
TOKEN_S = 0.02
"""seconds between two words of an answer"""

SLOW_WORDS = 10_000
TOGETHER = 4

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


class FakeApi:
    """The running pair in a child process, seen from a test."""

    def __init__(self, *, page: bool) -> None:
        self._has_page = page
        self._start()

    def _start(self, *ports: str) -> None:
        command = [sys.executable, __file__, *(["--page"] if self._has_page else []), *ports]
        path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        self._child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert self._child.stdout is not None
        urls = self._child.stdout.readline().split()
        assert len(urls) == 2, "the fake API did not start; what it says is above"
        self.url, self.keyed_url = urls

    def restart(self) -> None:
        """Kill both servers and start them again where they were."""
        self.stop()
        self._start(*(url.rpartition(":")[2] for url in (self.url, self.keyed_url)))

    def stop(self) -> None:
        self._child.kill()
        self._child.communicate()

    def requests(self) -> list[dict[str, Any]]:
        """Each: `body` as sent, `sent` words, `is_cancelled` if the client left before the end."""
        return list(self._call("GET"))

    def posted(self) -> list[dict[str, Any]]:
        """What was posted beside chats: the `path` below /v1 and the body."""
        return list(self._call("GET", "posted"))

    def forget(self) -> None:
        self._call("DELETE")

    def _call(self, method: str, what: str = "requests") -> Any:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/fake/{what}", method=method)) as reply:
            return json.load(reply)


@contextlib.contextmanager
def start_fake_api(*, page: bool) -> Iterator[FakeApi]:
    """Both servers, until the block ends. `page`: mount the browser page (seconds to import)."""
    api = FakeApi(page=page)
    try:
        yield api
    finally:
        api.stop()


def create_fake(key: str | None) -> FastAPI:
    app = FastAPI()
    seen: list[dict[str, Any]] = []
    all_have_asked = asyncio.Barrier(TOGETHER)

    def refusal(request: Request, needs_admin: bool = False) -> Response | None:
        given = request.headers.get("authorization")
        if key is None or given == f"Bearer {key}":
            return None
        if given != f"Bearer {ASKING_KEY}":
            return _error(401, "invalid_api_key", "the API key is missing or wrong.")
        if needs_admin:
            return _error(403, "insufficient_permissions", "this API key may ask, but not manage: use an admin key.")
        return None

    extensions = Extensions(MODELS, refusal, _error)
    extensions.add_to(app)

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
        if question == "together":
            await all_have_asked.wait()
        if question == "404":
            return _no_model(body["model"])
        if question == "500" or (question == "500 once" and not asked_before):
            return _error(500, "internal_error", "the server failed unexpectedly; its log says more.")
        return StreamingResponse(_answer(entry, body, question), media_type="text/event-stream")

    @app.get("/fake/requests")
    async def requests() -> Response:
        return JSONResponse(seen)

    @app.get("/fake/posted")
    async def posted() -> Response:
        return JSONResponse(extensions.posted)

    @app.delete("/fake/requests")
    async def forget() -> Response:
        seen.clear()
        extensions.forget()
        return JSONResponse([])

    return app


async def _answer(entry: dict[str, Any], body: dict[str, Any], question: str) -> AsyncIterator[str]:
    words = f"{body['model']} says: {question}".split(" ")
    if question.startswith("blind "):
        words = question.split(" ")
    if question == "slow":
        words += [f"and {at}" for at in range(SLOW_WORDS)]
    if question == "long":
        words += [f"and {at}" for at in range(60)]
    try:
        for word in words:
            text = (" " if entry["sent"] else "") + word
            choice: dict[str, Any] = {"index": 0, "delta": {"content": text}}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": text, "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
            yield _event({"choices": [choice]})
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


async def _serve_both(ports: list[str], *, page: bool) -> None:
    servers = []
    for key, port in zip((None, KEY), ports or ("0", "0"), strict=True):
        app = create_fake(key)
        listener = socket.create_server(("127.0.0.1", int(port)))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if page:
            from serve.ui import mount_page

            mount_page(app, url, needs_key=key is not None)
        servers.append((uvicorn.Server(uvicorn.Config(app, log_level="critical")), listener, url))
    print(*(url for _, _, url in servers), flush=True)
    await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener, _ in servers))


if __name__ == "__main__":
    asyncio.run(_serve_both([given for given in sys.argv[1:] if given.isdigit()], page="--page" in sys.argv))
