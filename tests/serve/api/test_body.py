"""Invalid request bodies: each is refused with a message, and never with a 500."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_bench import Bench, run

from serve.api.body import MAX_ENTRIES

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
HALF = "\\ud83d"
GOOD = json.dumps(CHAT)


def _with(field: str, value: str) -> bytes:
    """Return the good request with one more field, as JSON text."""
    return f'{GOOD[:-1]}, "{field}": {value}}}'.encode()


def _regex(text: str) -> bytes:
    """Return the good request with a long regex, which is already escaped for JSON."""
    return _with("structured_outputs", f'{{"regex": "{text}"}}')


@pytest.mark.parametrize(
    ("body", "status", "said", "param"),
    [
        (b"", 400, "empty", None),
        (b" \n", 400, "empty", None),
        (b"null", 400, "is null", None),
        (b"[]", 400, "is a list", None),
        (b"5", 400, "is a number", None),
        (b'"x"', 400, "is a string", None),
        (b"true", 400, "is true or false", None),
        (b'{"model":"x"', 400, "not valid JSON: Expecting ',' delimiter (line 1, column 13)", None),
        (b"{'model':'x'}", 400, "not valid JSON", None),
        (b'{"model":"x"} {}', 400, "not valid JSON: Extra data", None),
        (b'{"model": "\xff\xfe"}', 400, "invalid utf-8 at byte 11", None),
        (b'{"model": "\xed\xa0\xbd"}', 400, "invalid utf-8", None),  # a surrogate, as no UTF-8 may have it
        (b"[" * 200_000, 413, "JSON values", None),
        (b'{"a":' * 150_000, 413, "JSON values", None),
        (_with("metadata", "[" * 900 + "]" * 900), 400, "nested too deeply", None),
        (_with("metadata", "[" * 5000 + "]" * 5000), 400, "nested too deeply", None),
        (_with("top_k", "9" * 5000), 400, "5,000 digits", None),
        (_with("stop", json.dumps([0] * (MAX_ENTRIES + 1))), 413, "entries", None),
        (_with("metadata", json.dumps({str(n): "" for n in range(MAX_ENTRIES + 1)})), 413, "members", None),
        (_with("stop", json.dumps("x" * 1001)), 400, "a stop string has 1,001 characters", None),
        *(
            (_with(field, json.dumps(value, ensure_ascii=False)), 400, f"{where}: 70,0{rest} characters", where)
            for field, value, where, rest in (
                ("structured_outputs", {"regex": "a" * 70_000}, "structured_outputs.regex", "00"),
                ("structured_outputs", {"grammar": "a" * 70_000}, "structured_outputs.grammar", "00"),
                ("structured_outputs", {"choice": ["." * 35_000] * 2}, "structured_outputs.choice", "00"),
                ("structured_outputs", {"json": "\u00e9" * 70_000}, "structured_outputs.json", "00"),
                ("structured_outputs", {"json": {"a": "\u00e9" * 70_000}}, "structured_outputs.json", "08"),
                ("response_format", {"type": "json_schema", "json_schema": {"schema": {"a": "\u00e9" * 70_000}}},
                 "response_format.json_schema.schema", "08"),
            )
        ),
        *(
            (_with(field, json.dumps(value)), 400, f"{where}: ", where)
            for field, value, where in (
                ("model", "x" * 501, "model"),
                ("adapter", {"name": "x" * 501}, "adapter.name"),
                ("adapter", [{"name": "x" * 501}], "adapter.0.name"),
                ("user", "x" * 513, "user"),
                ("prompt_cache_key", "x" * 513, "prompt_cache_key"),
                ("safety_identifier", "x" * 513, "safety_identifier"),
                ("metadata", {"x": "x" * 513}, "metadata.x"),
                ("metadata", {str(n): "" for n in range(17)}, "metadata"),
                ("messages", [{"role": "user", "content": "", "name": "x" * 513}], "messages.0.name"),
            )
        ),
        (_with("model", '"captain' + "x" * 490 + '"'), 404, "nearest: ", "model"),
        (_with("temperature", "NaN"), 400, "temperature", "temperature"),
        (_with("model", "[]"), 400, "model: ", "model"),
        (_with("messages", "[]"), 400, "messages: ", "messages"),
        (_with("messages", '[{"role": "user", "content": [{"type": "image_url"}]}]'), 400,
         "messages.0.content.0.type: Input should be 'text'; messages.0.content.0.text: Field required", None),
        (_with("x" * 500, "1"), 400, "x" * 100 + ": Extra inputs", "x" * 100),
        (_with(HALF, "1"), 400, "half a surrogate pair (\\ud83d)", None),
    ],
    ids=lambda value: repr(value[-60:]) if isinstance(value, bytes) else "",
)  # fmt: skip
def test_an_odd_body_is_refused_with_its_place(
    tmp_path: Path, body: bytes, status: int, said: str, param: str | None
) -> None:
    async def test(b: Bench) -> None:
        headers = {"content-type": "application/json"}
        answer = await b.client.post("/v1/chat/completions", content=body, headers=headers)
        error = answer.json()["error"]
        assert answer.status_code == status, error
        assert said in error["message"]
        assert len(error["message"]) < 700
        assert param is None or error["param"] == param
        assert (await b.chat()).status_code == 200

    run(tmp_path, test)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("messages", f'[{{"role": "user", "content": "hi {HALF}"}}]', "messages.0.content"),
        ("messages", f'[{{"role": "user"}}, {{"role": "{HALF}", "content": ""}}]', "messages.1.role"),
        ("messages", f'[{{"content": [{{"type": "text", "text": "{HALF}"}}]}}]', "messages.0.content.0.text"),
        ("model", f'"{HALF}"', "model"),
        ("stop", f'["a", "{HALF}"]', "stop.1"),
        ("user", f'"{HALF}"', "user"),
        ("metadata", f'{{"{HALF}": "a"}}', "metadata"),
        ("adapter", f'{{"name": "{HALF}"}}', "adapter.name"),
        ("structured_outputs", f'{{"choice": ["{HALF}"]}}', "structured_outputs.choice.0"),
        ("tools", f'[{{"type": "function", "function": {{"name": "{HALF}"}}}}]', "tools.0.function.name"),
    ],
    ids=str,
)
def test_half_a_surrogate_pair_is_refused_with_its_place(
    tmp_path: Path, field: str, value: str, where: str, encoding: str
) -> None:
    async def test(b: Bench) -> None:
        body = _with(field, value).decode().encode(encoding)
        headers = {"content-type": "application/json"}
        answer = await b.client.post("/v1/chat/completions", content=body, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, where)
        assert error["message"].startswith(f"{where}: half a surrogate pair")

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (GOOD.encode("utf-8-sig"), "application/json"),
        (GOOD.encode("utf-16"), "application/json"),
        (GOOD.encode("utf-32-le"), "application/json"),
        (GOOD.encode(), "application/json; charset=utf-8"),
        (GOOD.encode(), "Application/JSON"),
        (GOOD.encode(), "application/vnd.api+json"),
        (_with("max_tokens", "1"), "application/json"),  # the second of two counts
        (_with("user", '"\\ud83e\\udee0"'), "application/json"),  # a whole pair
        (_with("structured_outputs", json.dumps({"choice": ["." * 65_536]})), "application/json"),
        (_with("structured_outputs", json.dumps({"json": {"a": "\u00e9" * 65_528}})), "application/json"),
        (_regex("[{," * 20_000), "application/json"),  # brackets within a text are no values
        (_regex('\\"[[[[\\\\' * 9_000), "application/json"),
        (GOOD.encode() + b" " * 200_000, "application/json"),
    ],
    ids=[
        "bom",
        "utf-16",
        "utf-32",
        "charset",
        "case",
        "+json",
        "twice",
        "pair",
        "choice",
        "accents",
        "brackets",
        "escapes",
        "long",
    ],
)
def test_unusual_but_sound_json_is_understood(tmp_path: Path, body: bytes, content_type: str) -> None:
    async def test(b: Bench) -> None:
        answer = await b.client.post("/v1/chat/completions", content=body, headers={"content-type": content_type})
        assert answer.status_code == 200, answer.text

    run(tmp_path, test)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/load_lora_adapter", "/v1/adapters/pull", "/v1/feedback"])
def test_every_route_refuses_what_is_no_json_object(tmp_path: Path, path: str) -> None:
    async def test(b: Bench) -> None:
        for body in (b"", b"null", b"[", b'{"a": "\xff"}', f'{{"a": "{HALF}"}}'.encode(), b'{"a": 1}'):
            answer = await b.client.post(path, content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request"), body

    run(tmp_path, test)


def test_a_compressed_body_is_refused(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = await b.client.post("/v1/chat/completions", content=b"\x1f\x8b", headers=headers)
        assert answer.status_code == 415
        assert "uncompressed" in answer.json()["error"]["message"]

    run(tmp_path, test)
