"""Who may do what, by every way in: each route with keys, from other sites' pages, and with other types of bodies."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_bench import bench
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount

from adapterhub.browser_guard import host_names
from adapterhub.cli.main import app
from adapterhub.errors import UsageError
from serve.api.access import ACCESS, Right
from serve.api.app import create_app
from serve.api.auth import ApiKeys
from serve.config import HttpLimits
from serve.training.runs import TrainingRuns
from serve.ui.app import mount_page

KEYS = ApiKeys(asking=("ask",), admin=("rule",))
EVIL = "http://evil.example"
UNSAFE = ("POST", "PUT", "PATCH", "DELETE")


def on_whole_app(
    tmp_path: Path,
    test: Callable[[FastAPI, httpx.AsyncClient], Awaitable[None]],
    keys: ApiKeys | None = None,
    *,
    has_page: bool = False,
    **limits: Any,
) -> None:
    """Run `test` on an application with every route of the API, and with the page where it is asked for."""

    async def whole() -> None:
        async with bench(tmp_path) as b:
            services = replace(b.services, training=TrainingRuns(tmp_path / "training"))
            app = create_app(services, keys or ApiKeys(), HttpLimits(**limits))
            if has_page:
                mount_page(app, "http://127.0.0.1:9", needs_key=keys is not None)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                await asyncio.wait_for(test(app, client), 30)

    asyncio.run(whole())


def routes(app: FastAPI) -> list[tuple[str, str, str]]:
    """Return (method, path to request, path as declared) of every route but the page's own."""
    found = []
    for route in iter_route_contexts(app.routes):
        if not isinstance(route.original_route, Mount):
            assert route.path is not None
            concrete = route.path.replace("{name:path}", "captain").replace("{name}", "none")
            found += [(method, concrete, route.path) for method in sorted(route.methods or ())]
    return found


def test_every_route_has_a_summary_of_its_own(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        paths = (await client.get("/openapi.json")).json()["paths"]
        summaries = [route["summary"] for methods in paths.values() for route in methods.values()]
        assert "Create a chat completion" in summaries
        assert "Pull an adapter from the server's Hub" in summaries
        assert len(summaries) == len(set(summaries))
        assert not [summary for summary in summaries if summary.istitle() or summary.endswith(".")]

    on_whole_app(tmp_path, test, KEYS, has_page=False)


def test_every_route_says_who_may_use_it_and_keeps_to_it(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        found = routes(app)
        assert {path for _, _, path in found} | {"/"} == set(ACCESS)
        for method, path, declared in found:
            right = ACCESS[declared].right
            for key, refused in ((None, 401), ("wrong", 401), ("ask", 403)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = await client.request(method, path, headers=headers)
                is_refused = right is Right.MANAGE or (right is Right.ASK and key != "ask")
                assert (answer.status_code == refused) is is_refused, (method, path, key, answer.text)

    on_whole_app(tmp_path, test, KEYS, has_page=True)


MEASURED_ELSEWHERE = {
    "content",
    "text",
    "prompt",
    "stop",
    "json",
    "regex",
    "choice",
    "grammar",
    "schema",
    "description",
}
"""What is tokenized (refused when it is certainly too long), and what serve/api/request_limits.py measures"""


def texts(schema: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(field, JSON schema) of each text within a body."""
    if isinstance(schema, list):
        for one in schema:
            yield from texts(one, name)
    elif isinstance(schema, dict):
        if schema.get("type") == "string":
            yield name, schema
        for key, value in schema.items():
            if key == "properties":
                for field, one in value.items():
                    yield from texts(one, field)
            else:
                yield from texts(value, name)


def test_no_text_that_a_body_may_hold_is_without_bounds(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        bodies = (await client.get("/openapi.json")).json()["components"]["schemas"]
        found = [(f"{body}.{name}", name, text) for body in bodies for name, text in texts(bodies[body])
                 if body not in ("HTTPValidationError", "ValidationError")]  # fmt: skip
        assert len(found) > 50
        for place, name, text in found:
            assert name in MEASURED_ELSEWHERE or {"maxLength", "pattern", "enum", "const"} & set(text), place

    on_whole_app(tmp_path, test)


def test_a_name_in_a_path_is_shown_and_compared_in_part(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/models/" + "captain" * 9_000)
        assert answer.status_code == 404
        assert len(answer.text) < 1000

    on_whole_app(tmp_path, test)


def test_a_route_that_says_nothing_cannot_be_added(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        with pytest.raises(LookupError, match="/v1/new"):
            app.get("/v1/new")(lambda: "anybody?")

    on_whole_app(tmp_path, test)


def test_without_keys_no_route_answers_to_a_foreign_name(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        for method, path, _ in [*routes(app), ("GET", "/ui", ""), ("GET", "/ui/config", ""), ("GET", "/nowhere", "")]:
            answer = await client.request(method, path, headers={"host": "evil.example:8000"})
            assert answer.status_code == 403, (method, path)
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "site_not_allowed"
                assert "--allowed-host" in answer.json()["error"]["message"]
        for path in ("queue/join", "upload"):
            answer = await client.post(f"/ui/gradio_api/{path}", headers={"origin": EVIL})
            assert answer.json()["error"]["code"] == "site_not_allowed"
        assert (await client.get("/ui/", headers={"sec-fetch-site": "cross-site"})).status_code == 200  # a link

    on_whole_app(tmp_path, test, has_page=True)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},  # another program of this machine
        {"origin": "https://127.0.0.1"},
        {"origin": "http://127.0.0.1:8000.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": EVIL},
    ],
    ids=str,
)
def test_without_keys_no_route_acts_for_a_foreign_page(tmp_path: Path, headers: dict[str, str]) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        acting = [(method, path) for method, path, _ in routes(app) if method in UNSAFE]
        assert len(acting) > 15
        for method, path in acting:
            answer = await client.request(method, path, headers=headers)
            assert answer.status_code == 403, (method, path)
            assert answer.json()["error"]["code"] == "site_not_allowed"

    on_whole_app(tmp_path, test)


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/x/y+json",
        "application/+json", "",
    ],
)  # fmt: skip
def test_no_route_acts_on_a_body_that_any_page_could_send(tmp_path: Path, content_type: str) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        headers = {"content-type": content_type} if content_type else {}
        acting = [(method, path) for method, path, _ in routes(app) if method in UNSAFE]
        for method, path in acting:
            answer = await client.request(method, path, content=b"{}", headers=headers)
            assert answer.status_code == 415, (method, path)
            assert "Content-Type: application/" in answer.json()["error"]["message"]

    on_whole_app(tmp_path, test)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"host": "localhost:1234", "origin": "http://localhost:1234"}, ()),
        ({"host": "LOCALHOST."}, ()),
        ({"host": "localhost:"}, ()),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, ()),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1"}, ()),
        ({"host": "127.0.0.1:443", "origin": "https://127.0.0.1"}, ()),
        ({"host": "127.8.8.8:8000"}, ()),
        ({"sec-fetch-site": "same-origin", "origin": "https://tool.example"}, ()),  # behind a proxy that sets the Host
        ({"sec-fetch-site": "none"}, ()),
        ({"host": "tool.example", "origin": "https://tool.example"}, ("tool.example",)),
        ({"sec-fetch-site": "cross-site", "origin": "https://tool.example"}, ("Tool.Example",)),
    ],
    ids=str,
)
def test_own_pages_programs_and_allowed_names_are_let_in(
    tmp_path: Path, headers: dict[str, str], allowed: tuple[str, ...]
) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
        assert (await client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200

    on_whole_app(tmp_path, test, allowed_hosts=allowed)


def test_a_key_in_a_header_needs_no_more_and_one_in_a_cookie_does(tmp_path: Path) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        foreign = {"host": "evil.example", "origin": EVIL}
        asking = {**foreign, "authorization": "Bearer ask"}
        assert (await client.get("/v1/models", headers=asking)).status_code == 200
        assert (await client.delete("/v1/feedback", headers=asking)).status_code == 200
        assert (await client.get("/ui", headers={"host": "tool.example"})).status_code == 401  # the form to sign in
        # A browser adds a cookie by itself, and what signs it in at a proxy.
        for path, more in itertools.product(
            ("/ui/sign-in", "/ui/gradio_api/queue/join"), ({}, {"authorization": "Basic YTpi"}, {"authorization": "x"})
        ):
            headers = {"cookie": "adapterhub_key=ask", "origin": EVIL, **more}
            answer = await client.post(path, data={"key": "ask"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "site_not_allowed")

    on_whole_app(tmp_path, test, KEYS, has_page=True)


@pytest.mark.parametrize(
    ("headers", "said", "advises"),
    [
        ([("host", "evil.example")], "the name 'evil.example'", True),
        ([("host", "127.0.0.1"), ("host", "localhost")], "2 Host headers: send one", False),
        ([("host", "127.0.0.1"), ("host", "evil.example")], "the name 'evil.example'", True),
        ([("origin", EVIL)], repr(EVIL), True),
        ([("origin", "null")], "'null'", False),
        ([("origin", "chrome-extension://abc")], "'chrome-extension://abc'", False),
        ([("sec-fetch-site", "cross-site")], "'cross-site'", False),
    ],
    ids=str,
)
def test_a_refusal_says_what_is_strange_and_what_helps(
    tmp_path: Path, headers: list[tuple[str, str]], said: str, advises: bool
) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        if "host" not in dict(headers):
            headers.append(("host", "127.0.0.1:8000"))
        message = (await client.post("/v1/completions", headers=headers)).json()["error"]["message"]
        assert said in message
        assert ("--allowed-host" in message) is advises

    on_whole_app(tmp_path, test)


def test_names_of_hosts_are_taken_as_browsers_send_them() -> None:
    given = ("tools.example", "Tools.Example.", "a_b", "192.0.2.7", "x.example:8443", "fe80::0005", "[::1]")
    assert host_names(given) == (*given[:5], "[fe80::5]", "[::1]")


@pytest.mark.parametrize(
    "name", ["https://x", "*.x", "*", "", ".x", "x..y", "x/y", "x:y", "x:", "x y", "a,b", "caf\u00e9.example", "[::1"]
)
def test_what_is_no_name_of_a_host_is_refused_at_start(name: str) -> None:
    for verb in (["serve", "--base", "none/such"], ["page"]):
        with pytest.raises(UsageError, match="invalid --allowed-host"):
            app(args=[*verb, "--allowed-host", "fine.example", "--allowed-host", name], standalone_mode=False)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/",
        "//v1/models",
        "/v1//models",
        "/v1/models%2F",
        "/v1%2Fmodels",
        "/v1/models/x%2F..%2F..",
        "/V1/models",
    ],
)
def test_no_spelling_of_a_path_bypasses_the_keys(tmp_path: Path, path: str) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT"):
            answer = await client.request(method, path, follow_redirects=True)
            assert answer.status_code in (400, 401, 404, 405), (method, answer.text)
            assert "captain" not in answer.text

    on_whole_app(tmp_path, test, KEYS)


@pytest.mark.parametrize("headers", [{"origin": EVIL}, {"host": "evil.example"}], ids=str)
def test_a_socket_of_a_foreign_page_is_closed_before_it_opens(tmp_path: Path, headers: dict[str, str]) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        sent: list[dict[str, Any]] = []
        given = {"host": "127.0.0.1:8000", **headers}
        scope = {
            "type": "websocket", "asgi": {"version": "3.0"}, "path": "/ui/ws", "raw_path": b"/ui/ws", "root_path": "",
            "query_string": b"", "scheme": "ws", "http_version": "1.1", "subprotocols": [],
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        assert [message["type"] for message in sent] == ["websocket.close"]

    on_whole_app(tmp_path, test)
