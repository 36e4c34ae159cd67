"""What comes before what: keys before bodies, limits before memory, lengths before tokens; all beside the loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from api_bench import HELLO, Bench, FakeTokenizer, bench, run

from adapterhub.net import listen
from serve.adapters.catalog import Catalog
from serve.api import body as bodies
from serve.api import unread_body
from serve.api.auth import ApiKeys
from serve.api.body import LARGE_BODY
from serve.api.prompts import PromptRenderer
from serve.api.token_length import TokenBound
from serve.config import HttpLimits

KEYS = ApiKeys(asking=("ask",), admin=("rule",))
MIB = 1 << 20


@asynccontextmanager
async def listening(
    tmp_path: Path, keys: ApiKeys | None = None, *, http: Any = "auto", **limits: Any
) -> AsyncIterator[tuple[Bench, int]]:
    """Serve the API over real HTTP, with the parser `http`; yield the port."""
    async with bench(tmp_path, keys, HttpLimits(**limits)) as b:
        app = b.client._transport.app  # type: ignore[attr-defined]
        with listen("127.0.0.1", 0) as listener:
            server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", http=http))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield b, listener.getsockname()[1]
            finally:
                server.should_exit = True
                await serving


def on_socket(
    tmp_path: Path, test: Callable[[Bench, int], Awaitable[None]], keys: ApiKeys | None = None, **limits: Any
) -> None:
    async def whole() -> None:
        async with listening(tmp_path, keys, **limits) as (b, port):
            await asyncio.wait_for(test(b, port), 20)

    asyncio.run(whole())


def head(size: int | None, *more: str, path: str = "/v1/chat/completions", version: str = "1.1") -> bytes:
    length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    lines = (f"POST {path} HTTP/{version}", "Host: 127.0.0.1", "Content-Type: application/json", length, *more)
    return "\r\n".join((*lines, "", "")).encode()


async def exchange(port: int, *parts: bytes) -> bytes:
    """Everything the server sends until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    finally:
        writer.close()


def error_of(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("more", "path", "status", "code"),
    [
        ((), "/v1/chat/completions", 401, "invalid_api_key"),
        (("Authorization: Bearer wrong",), "/v1/chat/completions", 401, "invalid_api_key"),
        (("Authorization: Bearer ask",), "/v1/load_lora_adapter", 403, "insufficient_permissions"),
        (("Authorization: Bearer ask",), "/v1/adapters/upload", 403, "insufficient_permissions"),
        (("Authorization: Bearer ask",), "/v1/chat/completions", 413, "request_too_large"),
        (("Expect: 100-continue",), "/v1/chat/completions", 401, "invalid_api_key"),
        (("Authorization: Bearer ask", "Expect: 100-continue"), "/v1/chat/completions", 413, "request_too_large"),
    ],
)
def test_an_answer_that_needs_no_body_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], path: str, status: int, code: str
) -> None:
    monkeypatch.setattr(unread_body, "LINGER_S", 0.01)

    async def test(b: Bench, port: int) -> None:
        answer = await exchange(port, head(30 * MIB, *more, path=path))  # not a byte of the body
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())  # no 100 Continue before it either
        assert b"connection: close" in answer
        assert error_of(answer)["code"] == code

    on_socket(tmp_path, test, KEYS)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_sends_before_it_listens_has_its_refusal(tmp_path: Path, version: str) -> None:
    async def test(b: Bench, port: int) -> None:
        for size in (100_000, 9 * MIB):
            answer = await exchange(port, head(size, version=version), b"x" * size)
            assert answer.startswith(b"HTTP/1.1 401 ")

    on_socket(tmp_path, test, KEYS)


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_body_is_refused_as_soon_as_it_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, http: str
) -> None:
    pytest.importorskip(http)
    monkeypatch.setattr(unread_body, "LINGER_S", 0.2)

    async def test(b: Bench, port: int) -> None:
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        answer = await exchange(port, head(None), *[chunk] * 17)  # no end: refused before it
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert "1,048,576 bytes" in error_of(answer)["message"]
        good = json.dumps({"model": "base", **HELLO}).encode()
        padded = good + b" " * (MIB - len(good))
        answer = await exchange(port, head(MIB, "Connection: close"), padded)
        assert answer.startswith(b"HTTP/1.1 200 ")
        answer = await exchange(port, head(MIB + 1), padded + b" ")
        assert answer.startswith(b"HTTP/1.1 413 ")

    on_socket(tmp_path, test, http=http, max_body_bytes=MIB)


def test_a_refused_body_of_a_pipelined_request_is_not_taken_for_the_next(tmp_path: Path) -> None:
    async def test(b: Bench, port: int) -> None:
        smuggled = head(2, "Authorization: Bearer ask", "Connection: close") + b"{}"
        answer = await exchange(port, head(len(smuggled)), smuggled)
        assert answer.count(b"HTTP/1.1 ") == 1
        good = json.dumps({"model": "base", **HELLO}).encode()
        asking = head(len(good), "Authorization: Bearer ask")
        answer = await exchange(port, asking + good + head(len(good), "Connection: close") + good)
        assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"401"]

    on_socket(tmp_path, test, KEYS)


class Call:
    """One request to the application, its body sent bit by bit by the test."""

    def __init__(self, b: Bench, size: int | None, path: str = "/v1/chat/completions") -> None:
        self.wants = asyncio.Event()
        """set while all that was given is taken, and more is asked for"""
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        length = {"transfer-encoding": "chunked"} if size is None else {"content-length": str(size)}
        headers = {"host": "127.0.0.1", "content-type": "application/json", **length}
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST", "path": path,
            "raw_path": path.encode(), "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        app = b.client._transport.app  # type: ignore[attr-defined]
        self.done: asyncio.Task[None] = asyncio.create_task(app(scope, self._receive, self._send))

    def give(self, chunk: bytes, *, more: bool) -> None:
        self.wants.clear()
        self._inbox.put_nowait({"type": "http.request", "body": chunk, "more_body": more})

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    async def _receive(self) -> dict[str, Any]:
        if self._inbox.empty():
            self.wants.set()
        return await self._inbox.get()

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


def large_request() -> bytes:
    return json.dumps({"model": "base", **HELLO}).encode() + b" " * LARGE_BODY


def test_large_bodies_wait_unread_while_others_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE_BODIES", 1)

    async def test(b: Bench) -> None:
        given = large_request()
        first, second = Call(b, len(given)), Call(b, len(given))
        first.give(given[:-1], more=True)
        await first.wants.wait()
        second.give(given[:-1], more=True)
        assert (await b.chat()).status_code == 200  # small ones do not wait
        assert not second.wants.is_set()
        first.give(given[-1:], more=False)
        await second.wants.wait()
        second.give(given[-1:], more=False)
        await asyncio.gather(first.done, second.done)
        assert (first.status, second.status) == (200, 200)

    run(tmp_path, test)


def test_only_what_has_come_takes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE_BODIES", 1)

    async def test(b: Bench) -> None:
        given, small = large_request(), json.dumps({"model": "base", **HELLO}).encode()
        announced, begun = Call(b, MIB), Call(b, None)
        begun.give(given[:LARGE_BODY], more=True)
        await asyncio.gather(announced.wants.wait(), begun.wants.wait())
        large, chunked = Call(b, len(given)), Call(b, None)
        large.give(given[:-1], more=True)
        await large.wants.wait()
        chunked.give(small, more=False)
        await chunked.done  # while the only room is taken
        large.give(given[-1:], more=False)
        await large.done
        assert (large.status, chunked.status) == (200, 200)
        for call in (announced, begun):
            call.leave()
            await call.done

    run(tmp_path, test)


def test_an_answer_that_takes_long_holds_no_room_for_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE_BODIES", 1)

    async def test(b: Bench) -> None:
        given, b.engine.hold = large_request(), asyncio.Event()
        first, second = Call(b, len(given)), Call(b, len(given))
        first.give(given, more=False)
        second.give(given[:-1], more=True)
        await second.wants.wait()  # while the first answer has only begun
        second.leave()
        await second.done
        while not b.engine.open_requests:
            await asyncio.sleep(0)
        assert not first.done.done()
        b.engine.hold.set()
        await first.done

    run(tmp_path, test)


def test_a_route_that_takes_long_holds_no_room_for_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE_BODIES", 1)

    async def test(b: Bench) -> None:
        begun, may_continue, load = asyncio.Event(), asyncio.Event(), Catalog.load

        async def held(*given: Any, **named: Any) -> Any:
            begun.set()
            await may_continue.wait()
            return await load(*given, **named)

        monkeypatch.setattr(Catalog, "load", held)
        given = json.dumps({"lora_name": "spare", "lora_path": "spare"}).encode() + b" " * LARGE_BODY
        loading = Call(b, len(given), "/v1/load_lora_adapter")
        loading.give(given, more=False)
        await begun.wait()
        other = Call(b, len(large_request()))
        other.give(large_request(), more=False)
        await other.done
        may_continue.set()
        await loading.done
        assert (other.status, loading.status) == (200, 200)

    run(tmp_path, test)


def test_clients_that_leave_or_stall_give_their_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE_BODIES", 1)
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(unread_body, "LINGER_S", 0.01)

    async def test(b: Bench) -> None:
        given = large_request()
        gone, stalled, last = (Call(b, len(given)) for _ in range(3))
        gone.give(given[:-1], more=True)
        gone.leave()
        stalled.give(given[:-1], more=True)
        last.give(given, more=False)
        await asyncio.gather(gone.done, stalled.done, last.done)
        assert (b"x-should-retry", b"false") in stalled.sent[0]["headers"]
        assert (gone.status, stalled.status, last.status) == (499, 408, 200)

    run(tmp_path, test)


class SlowTokenizer(FakeTokenizer):
    """Waits for the test within each call, as a long text makes a real one take long."""

    def __init__(self) -> None:
        self.begun, self.may_continue, self.num_calls = threading.Event(), threading.Event(), 0

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        self.num_calls += 1
        self.begun.set()
        assert self.may_continue.wait(20)
        return super().__call__(text, add_special_tokens=add_special_tokens)


def _with(b: Bench, prompts: PromptRenderer) -> None:
    object.__setattr__(b.services, "prompts", prompts)


def test_the_time_a_body_waits_for_room_is_not_its_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_LARGE_BODIES", 1)
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(unread_body, "LINGER_S", 0.01)

    async def test(b: Bench) -> None:
        slow = SlowTokenizer()
        _with(b, PromptRenderer(slow))
        given = large_request()
        holder, waiting = Call(b, len(given)), Call(b, len(given))
        holder.give(given, more=False)
        while not slow.begun.is_set():
            await asyncio.sleep(0)
        waiting.give(given[:-1], more=True)
        stalled = Call(b, 10)
        await stalled.done
        assert stalled.status == 408
        assert not waiting.wants.is_set()
        slow.may_continue.set()
        await waiting.wants.wait()
        waiting.give(given[-1:], more=False)
        await asyncio.gather(holder.done, waiting.done)
        assert (holder.status, waiting.status) == (200, 200)

    run(tmp_path, test)


def test_the_server_answers_others_while_it_tokenizes(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        slow = SlowTokenizer()
        _with(b, PromptRenderer(slow))
        long = {"model": "base", "prompt": "x" * LARGE_BODY}
        asked = asyncio.create_task(b.client.post("/v1/completions", json=long))
        others = [asyncio.create_task(b.client.post("/v1/completions", json=long)) for _ in range(5)]
        while not slow.begun.is_set():
            await asyncio.sleep(0)
        assert (await b.client.get("/health")).status_code == 200
        assert (await b.client.get("/v1/adapters")).status_code == 200  # the threads of other work are not taken
        assert slow.num_calls == 1  # one at a time
        for other in others:
            other.cancel()
        slow.may_continue.set()
        assert (await asked).status_code == 400  # more tokens than the fake engine holds
        assert (await b.client.post("/v1/completions", json={"model": "base", "prompt": "hi"})).status_code == 200

    run(tmp_path, test)


def test_a_client_that_leaves_while_its_prompt_is_tokenized_is_let_go(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        slow = SlowTokenizer()
        _with(b, PromptRenderer(slow))
        given = json.dumps({"model": "base", "prompt": "hello"}).encode()
        call = Call(b, len(given), "/v1/completions")
        call.give(given, more=False)
        while not slow.begun.is_set():
            await asyncio.sleep(0)
        call.leave()
        await call.done
        assert call.status == 499
        slow.may_continue.set()
        assert not b.engine.open_requests

    run(tmp_path, test)


def test_a_text_that_is_certainly_too_long_is_refused_without_tokenizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenBound, "of", lambda tokenizer: TokenBound(10))

    async def test(b: Bench) -> None:
        slow = SlowTokenizer()
        _with(b, PromptRenderer(slow))
        for field in ({"prompt": "x" * 1001}, {"messages": [{"role": "user", "content": "x" * 1001}]}):
            path = "/v1/completions" if "prompt" in field else "/v1/chat/completions"
            answer = await b.client.post(path, json={"model": "base", **field})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert "at least 101 tokens" in answer.json()["error"]["message"]
        many = await b.client.post("/v1/completions", json={"model": "base", "prompt": [1] * 101})
        assert many.json()["error"]["code"] == "context_length_exceeded"
        assert slow.num_calls == 0

    run(tmp_path, test)


def test_an_upload_may_be_larger_than_other_bodies_and_must_keep_arriving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.05)

    async def test(b: Bench, port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            headers = {"content-type": "application/zip"}
            answer = await client.post("/v1/adapters/upload", content=b"no zip" * 1000, headers=headers)
            assert answer.status_code == 422  # read to its end, and looked at
        stalled = head(100, path="/v1/adapters/upload").replace(b"application/json", b"application/zip")
        assert (await exchange(port, stalled, b"begun")).startswith(b"HTTP/1.1 408 ")

    monkeypatch.setattr(unread_body, "LINGER_S", 0.01)
    on_socket(tmp_path, test, max_body_bytes=100)
