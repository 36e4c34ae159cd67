"""The HTTP API on a fake engine: shapes, refusals and what happens when clients leave."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_bench import HELLO, Bench, run
from packages import write_package

from adapterhub.errors import AdapterNoEffect, AdapterNotFound
from adapterhub.package.layout import open_adapter
from serve.api.auth import ApiKeys
from serve.api.schemas import ChatRequest, chat_logprobs, completion_logprobs
from serve.engine import TokenLogprob


def _error(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    return error  # type: ignore[no-any-return]


def test_models_are_the_base_and_then_each_adapter(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        cards = (await b.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["base", "captain", "poet"]
        assert cards[0]["parent"] is None
        assert cards[1]["parent"] == "base"
        assert cards[1]["digest"].startswith("sha256:")
        one = (await b.client.get("/v1/models/captain")).json()
        assert one == cards[1]
        assert str(tmp_path) not in json.dumps(cards)  # no path of the server's disk

    run(tmp_path, test)


def test_the_base_answers_to_both_its_names_and_an_adapter_to_its_own(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        for model, adapters in (("base", 0), ("owner/base", 0), ("captain", 1)):
            body = (await b.chat(model=model)).json()
            assert body["model"] == model
            assert body["choices"][0]["message"]["content"].endswith(f"{adapters} adapters")

    run(tmp_path, test)


def test_an_unknown_model_is_404_and_never_the_base(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        response = await b.chat(model="captian")
        assert response.status_code == 404
        error = _error(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "captain" in error["message"]

    run(tmp_path, test)


def test_the_adapters_own_chat_template_renders_its_prompts(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        plain = (await b.chat(model="base")).json()["usage"]["prompt_tokens"]
        own = (await b.chat(model="captain")).json()["usage"]["prompt_tokens"]
        assert own == plain + 1  # the fake tokenizer puts the template's first letter in front

    run(tmp_path, test)


def test_a_stream_has_openais_events_in_order(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        response = await b.chat(stream=True, stream_options={"include_usage": True}, max_tokens=8)
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(e["choices"][0]["delta"]["content"] for e in events[:-1]) == "2 tokens"
        assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * 7 + ["length"]
        assert events[-1]["choices"] == []
        assert events[-1]["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 8,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    run(tmp_path, test)


def test_n_answers_are_counted_together_and_numbered(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        body = (await b.chat(n=3, max_tokens=4)).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert body["usage"]["completion_tokens"] == 12
        streamed = (await b.chat(n=2, max_tokens=4, stream=True)).text
        indices = [json.loads(line[6:])["choices"][0]["index"] for line in streamed.split("\n\n")[:-2]]
        assert sorted(indices) == [0] * 4 + [1] * 4

    run(tmp_path, test)


def test_logprobs_have_openais_shape(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        chat = (await b.chat(logprobs=True, top_logprobs=1, max_tokens=2)).json()
        first = chat["choices"][0]["logprobs"]["content"][0]
        assert (first["token"], first["logprob"], len(first["top_logprobs"])) == ("2", -0.5, 1)
        body = {"model": "base", "prompt": "hi", "max_tokens": 2, "logprobs": 1}
        plain = (await b.client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
        assert plain["tokens"] == ["2", " "]
        assert plain["text_offset"] == [0, 1]
        streamed = (await b.client.post("/v1/completions", json={**body, "stream": True})).text
        events = [json.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
        assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0], [1]]

    run(tmp_path, test)


def test_tokens_of_one_name_have_two_entries_and_the_chosen_one_is_listed() -> None:
    top = (
        TokenLogprob(5, "a", b"a", -0.1),
        TokenLogprob(9, "a", b"a", -0.2),
        TokenLogprob(6, "bytes:\\xf0", b"\xf0", -3),
    )
    chosen = TokenLogprob(7, "a", b"a", -9.0, top, 4)
    found = completion_logprobs([chosen, TokenLogprob(5, "a", b"a", -0.1, top[:1], 5)])
    assert found["top_logprobs"] == [
        {"token_id:5": -0.1, "token_id:9": -0.2, "bytes:\\xf0": -3, "a": -9.0},
        {"a": -0.1},
    ]
    assert found["text_offset"] == [4, 5]
    assert chat_logprobs([chosen])["content"][0]["top_logprobs"][2]["bytes"] == [240]
    assert chat_logprobs([TokenLogprob(2, "</s>", None, -1.0)])["content"][0]["bytes"] is None


def test_cached_tokens_are_those_of_the_first_choice_streamed_or_not(tmp_path: Path) -> None:
    """What the others share may be what the first one has just computed."""

    async def test(b: Bench) -> None:
        b.engine.num_cached_tokens = {0: 3, 1: 64}
        whole = (await b.chat(n=2)).json()
        streamed = (await b.chat(n=2, stream=True, stream_options={"include_usage": True})).text
        for usage in (whole["usage"], json.loads(streamed.split("\n\n")[-3][6:])["usage"]):
            assert usage["prompt_tokens_details"] == {"cached_tokens": 3}

    run(tmp_path, test)


NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400", "true", '"nan"', "[]", "9" * 99)
REFUSED = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), (*NOT_NUMBERS, "-1e-3", "2.0001")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (*NOT_NUMBERS, "2.1", "-2.1")),
    "repetition_penalty": (*NOT_NUMBERS, "0", "1e-38", "1e-300", "-0.0", "10.1"),
    "n": (*NOT_NUMBERS, "0", "17", "1.5", "-0.0"),
    "seed": (*NOT_NUMBERS, "1.5", "9223372036854775808", "-9223372036854775809"),
    "top_k": ("NaN", "1e400", "true", "1.5", "-2"),
    "max_tokens": ("NaN", "1e400", "true", "0", "-1"),
    "logit_bias": tuple(f'{{"{key}": 1}}' for key in ("1e3", " 5", "-1", "9" * 20, "+5", "05", "5.0", "٥", ""))
    + tuple(f'{{"5": {value}}}' for value in ("NaN", "true", "101", "1e400")),
    "stop_token_ids": ("[true]", "[1.5]", "[NaN]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_cannot_be_meant_are_refused_by_name(tmp_path: Path, name: str) -> None:
    async def test(b: Bench) -> None:
        for value in REFUSED[name]:
            body = f'{{"model": "base", "messages": [{{"role": "user", "content": "hi"}}], "{name}": {value}}}'
            headers = {"content-type": "application/json"}
            answer = await b.client.post("/v1/chat/completions", content=body.encode(), headers=headers)
            assert answer.status_code == 400, value
            assert name in answer.json()["error"]["message"], value

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("sent", "used"),
    [
        ({"temperature": -0.0}, 0.0),
        ({"temperature": 1e-38}, 0.0),
        ({"temperature": 5e-324}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_p": 1e-46}, 1e-6),  # the best token alone
        ({"min_p": 1e-320}, 0.0),
        ({"top_k": 10**30}, 10**30),
        ({"top_k": -1}, 0),
        ({"presence_penalty": -1e-300}, 0.0),
        ({"seed": -1}, 2**63 - 1),
        ({"logit_bias": {"5": 1e-46}}, ((5, 0.0),)),
    ],
    ids=str,
)
def test_numbers_too_small_for_fp32_are_what_they_are_in_the_arithmetic(sent: dict[str, Any], used: object) -> None:
    body = ChatRequest.model_validate({"model": "base", **HELLO, **sent})
    sampling = body.sampling(max_tokens=1, extra_stop=[], end_tokens=[], top_logprobs=None)[0]
    assert getattr(sampling, next(iter(sent))) == used


def test_each_of_several_answers_is_another_draw_within_one_choice() -> None:
    body = ChatRequest.model_validate(
        {"model": "m", **HELLO, "n": 3, "seed": 2**63 - 2, "structured_outputs": {"choice": ["a", "b"]}}
    )
    choices = body.sampling(max_tokens=1, extra_stop=[], end_tokens=[], top_logprobs=None)
    assert [one.seed for one in choices] == [2**63 - 2, 2**63 - 1, 0]
    assert len({id(one.guided_decoding) for one in choices}) == 1  # built once, where the body was parsed


def test_completions_take_text_and_tokens(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        for prompt in ("hey", [1, 2, 3], ["hey"]):
            response = await b.client.post("/v1/completions", json={"model": "poet", "prompt": prompt})
            assert response.json()["usage"]["prompt_tokens"] == 3
            assert response.json()["object"] == "text_completion"

    run(tmp_path, test)


def test_adapters_are_mixed_by_the_extension(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        mix = [{"name": "captain", "scale": 0.7}, {"name": "poet", "scale": 0.3}]
        body = (await b.chat(adapter=mix)).json()
        assert body["choices"][0]["message"]["content"].endswith("2 adapters")
        assert "x0.7" in body["system_fingerprint"]

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"adapter": {"name": "nobody"}}, "nobody"),
        ({"adapter": [{"name": "poet"}, {"name": "poet"}, {"name": "captain"}]}, "has poet more than once"),
        ({"model": "captain", "adapter": {"name": "poet"}}, "is not in adapter (poet)"),
        ({"adapter": {"name": "base"}}, "base model"),
        ({"adapter": {"name": "poet", "scale": 99}}, "scale"),
        ({"temperature": 9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n:"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"tools": []}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "chat template"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "100"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_bad_request_is_refused_in_openais_shape(tmp_path: Path, body: dict[str, Any], said: str) -> None:
    async def test(b: Bench) -> None:
        for stream in (False, True):
            response = await b.chat(**body, stream=stream)
            assert response.status_code in (400, 404)
            assert said in _error(response)["message"]

    run(tmp_path, test)


def test_a_body_that_is_not_json_and_a_wrong_path_are_refused_in_the_same_shape(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        response = await b.client.post(
            "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
        )
        assert (response.status_code, _error(response)["code"]) == (400, "invalid_request")
        response = await b.client.get("/v1/nothing")
        assert (response.status_code, _error(response)["code"]) == (404, "not_found")

    run(tmp_path, test)


def test_adapters_come_and_go_while_serving(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        assert (await b.chat(model="spare")).status_code == 404
        load = await b.client.post("/v1/load_lora_adapter", json={"lora_name": "spare", "lora_path": "spare"})
        assert load.text == "Success: LoRA adapter 'spare' added successfully."
        assert (await b.chat(model="spare")).status_code == 200
        again = await b.client.post("/v1/load_lora_adapter", json={"lora_name": "spare", "lora_path": "spare"})
        assert again.status_code == 200  # the same content: nothing to do
        gone = await b.client.post("/v1/unload_lora_adapter", json={"lora_name": "spare"})
        assert gone.text == "Success: LoRA adapter 'spare' removed successfully."
        assert (await b.chat(model="spare")).status_code == 404
        assert (await b.client.post("/v1/unload_lora_adapter", json={"lora_name": "spare"})).status_code == 404

    run(tmp_path, test)


def test_a_taken_name_is_replaced_only_when_asked(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        body = {"lora_name": "captain", "lora_path": "captain2"}
        response = await b.client.post("/v1/load_lora_adapter", json=body)
        assert (response.status_code, _error(response)["code"]) == (409, "conflict")
        assert response.headers["x-should-retry"] == "false"
        before = (await b.chat(model="captain")).json()["system_fingerprint"]
        assert (await b.client.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})).status_code == 200
        assert (await b.chat(model="captain")).json()["system_fingerprint"] != before
        assert len(b.engine.loaded) == 2  # the old one is gone

    run(tmp_path, test)


@pytest.mark.parametrize("path", ["./captain", "/etc", "../x"])
def test_a_client_may_not_choose_a_path_on_the_servers_disk(tmp_path: Path, path: str) -> None:
    async def test(b: Bench) -> None:
        response = await b.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert response.status_code == 400
        assert "path" in _error(response)["message"]

    run(tmp_path, test)


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        b.engine.load_error = AdapterNoEffect("no tensor of it belongs here")
        body = {"lora_name": "captain", "lora_path": "spare", "load_inplace": True}
        response = await b.client.post("/v1/load_lora_adapter", json=body)
        assert (response.status_code, _error(response)["code"]) == (422, "adapter_no_effect")
        assert (await b.chat(model="captain")).status_code == 200
        missing = await b.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "nowhere"})
        assert missing.status_code == 404

    run(tmp_path, test)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        folder = write_package(tmp_path / "other", name="other")
        raw = json.loads((folder / "adapterhub.json").read_text())
        raw["base"]["fingerprint"] = "fp1:" + "cd" * 32
        (folder / "adapterhub.json").write_text(json.dumps(raw))
        b.registry.add(open_adapter(folder))
        response = await b.client.post("/v1/load_lora_adapter", json={"lora_name": "other", "lora_path": "other"})
        assert (response.status_code, _error(response)["code"]) == (422, "adapter_base_mismatch")

    run(tmp_path, test)


def test_keys_guard_asking_and_only_an_admin_key_loads(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        for header, status in ((None, 401), ("Bearer wrong", 401), ("Basic ask", 401), ("Bearer ask", 200)):
            headers = {"authorization": header} if header else {}
            assert (await b.client.get("/v1/models", headers=headers)).status_code == status
        body = {"lora_name": "spare", "lora_path": "spare"}
        for key, status in (("ask", 403), ("boss", 200)):
            response = await b.client.post(
                "/v1/load_lora_adapter", json=body, headers={"authorization": f"Bearer {key}"}
            )
            assert response.status_code == status
        assert (await b.client.get("/health")).status_code == 200

    run(tmp_path, test, ApiKeys(asking=("ask",), admin=("boss",)))


def test_a_stopped_engine_is_503_and_not_ready(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        assert (await b.client.get("/ready")).status_code == 200
        b.engine.stopped = True
        assert (await b.client.get("/ready")).status_code == 503
        assert (await b.client.get("/health")).status_code == 200
        for stream in (False, True):
            response = await b.chat(stream=stream)
            assert (response.status_code, _error(response)["code"]) == (503, "engine_stopped")
            assert response.headers["x-should-retry"] == "false"

    run(tmp_path, test)


def test_metrics_are_labelled_by_published_names_only(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        await b.chat(model="captain", max_tokens=5)
        await b.chat(model="evil\nname")
        text = (await b.client.get("/metrics")).text
        assert 'vllm:generation_tokens_total{model_name="captain"} 5.0' in text
        assert 'vllm:request_success_total{finished_reason="length",model_name="captain"} 1.0' in text
        assert "adapterhub:adapters_resident 2.0" in text
        assert "evil" not in text

    run(tmp_path, test)


def test_unknown_errors_are_500_without_their_text(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        b.engine.load_error = RuntimeError("secret path")
        response = await b.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "spare"})
        assert response.status_code == 500
        assert "secret" not in response.text

    run(tmp_path, test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(tmp_path: Path, stream: bool) -> None:
    async def test(b: Bench) -> None:
        b.engine.hold = asyncio.Event()
        app = b.client._transport.app  # type: ignore[attr-defined]
        body = json.dumps({"model": "captain", **HELLO, "stream": stream}).encode()
        gone = asyncio.Event()
        inbox = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
            "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"", "http_version": "1.1",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        served = asyncio.create_task(app(scope, receive, send))
        while not b.engine.open_requests:
            await asyncio.sleep(0.001)
        gone.set()
        await served
        assert not b.engine.open_requests

    run(tmp_path, test)


def test_the_base_cannot_be_unloaded_or_shadowed(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        assert (await b.client.post("/v1/unload_lora_adapter", json={"lora_name": "base"})).status_code == 409
        body = {"lora_name": "base", "lora_path": "spare"}
        assert (await b.client.post("/v1/load_lora_adapter", json=body)).status_code == 409
        with pytest.raises(AdapterNotFound):
            b.services.catalog.find("")

    run(tmp_path, test)
