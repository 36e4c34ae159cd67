"""Random parameters through a real server: no 5xx, no crash, and a neighbour's greedy tokens stay the same.

A hundred and fifty requests, or 10,000 where ADAPTERHUB_SOAK_S is set (`make soak`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from engine_runs import load_tiny
from tiny_models import TINY_VOCABULARY

from adapterhub.adapter import StoredBase
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.adapters.catalog import Catalog
from serve.api.app import create_app
from serve.api.auth import ApiKeys
from serve.api.metrics import Metrics
from serve.api.prompts import PromptRenderer
from serve.api.services import Services
from serve.local_engine.engine import LocalEngine

NUM_SETS = 10_000 if float(os.environ.get("ADAPTERHUB_SOAK_S", "0")) else 150
NUM_CLIENTS = 8

NUMBERS = [
    *("0", "-0.0", "1e-5", "9e-6", "1e-10", "1e-38", "1.1754943e-38", "1.4e-45", "1e-46", "1e-300", "5e-324"),
    *(
        "0.01",
        "0.5",
        "0.9999999",
        "1",
        "1.0",
        "1.0000001",
        "2",
        "3",
        "-1",
        "-2",
        "100",
        "-100",
        "1e3",
        "3.4e38",
        "1e39",
    ),
    *("1e308", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "true", "false", "null", '"1"', '"nan"', "[]", "{}"),
    *("2147483648", "-2147483649", "9223372036854775807", "9223372036854775808", "-9223372036854775808"),
    *("9" * 30, "9" * 400, "9" * 5000, "0." + "0" * 60 + "1", "1e-400"),
]
"""as they stand in the JSON, which Python's parser takes: NaN and Infinity among them"""

SANE = {
    "temperature": ("0", "0.7", "2"), "top_p": ("0.9", "1"), "min_p": ("0.1", "0"), "top_k": ("1", "40", "-1"),
    "repetition_penalty": ("1.2", "0.5", "10"), "presence_penalty": ("1", "-2"), "frequency_penalty": ("2", "-1"),
    "n": ("1", "2", "16"), "seed": ("1", "-5"), "max_tokens": ("1", "3"), "stop_token_ids": ("[5]", "[]", "[-1]"),
    "logit_bias": ('{"5": 100}', '{"5": -100, "6": 1e-46}', "{}"), "ignore_eos": ("true", "false"),
    "stop": ('"a"', '["a", "\\ufffd"]', "[]"),
    "structured_outputs": ('{"regex": "[ab]+"}', '{"choice": ["a", "b"]}', '{"json": {}}'),
}  # fmt: skip

KEYS = ("5", "1e3", " 5", "-1", "9" * 20, str(TINY_VOCABULARY - 1), str(TINY_VOCABULARY), "+5", "0x5", "", "NaN", "٥")


def random_body(dice: random.Random) -> tuple[str, str]:
    """(path, JSON): two or three of the parameters are extreme, others sane."""
    is_chat = dice.random() < 0.5
    fields = {
        "model": '"base"', "max_tokens": "2", "stream": dice.choice(["true", "false"]),
        **({"messages": '[{"role": "user", "content": "Hi"}]'} if is_chat else {"prompt": '"Once upon"'}),
        **({"logprobs": "true", "top_logprobs": dice.choice("0259")} if is_chat else {"logprobs": dice.choice("0159")}),
    }  # fmt: skip
    for name in dice.sample(list(SANE), k=dice.randrange(4)):
        fields[name] = dice.choice(SANE[name])
    for name in dice.sample([*SANE, "logprobs", "top_logprobs"], k=dice.randrange(4)):
        number = dice.choice(NUMBERS)
        fields[name] = {
            "logit_bias": f"{{{json.dumps(dice.choice(KEYS))}: {number}}}", "stop_token_ids": f"[{number}]"
        }.get(name, number)  # fmt: skip
    return (
        "/v1/chat/completions" if is_chat else "/v1/completions",
        "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}",
    )


@contextmanager
def serving(base: StoredBase) -> Iterator[tuple[str, LocalEngine]]:
    """(URL, engine) of a server in a thread of this process."""
    loaded = load_tiny(base)
    engine = LocalEngine(loaded)
    cache = AdapterCache(4, load=engine.load, unload=engine.unload)
    catalog = Catalog(base, "base", Registry(base.path), cache)
    app = create_app(Services(engine, catalog, cache, PromptRenderer(loaded.tokenizer), Metrics(engine)), ApiKeys())
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()
            asyncio.run(engine.close())


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def _answer_of(client: httpx.Client, path: str, body: str) -> tuple[int, list[Any]]:
    """(status, the JSON values of the body or of its events), all of them strict JSON."""
    found = client.post(path, content=body.encode(), headers={"content-type": "application/json"})
    if found.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in found.text.splitlines() if line]
        assert events.pop() == "[DONE]"
    else:
        events = [found.text]
    return found.status_code, [json.loads(event, parse_constant=_no_constant) for event in events]


@pytest.mark.timeout(3600 if NUM_SETS > 1000 else 300)
def test_no_parameters_make_a_server_fail_or_change_a_neighbours_tokens(tiny_base: StoredBase) -> None:
    greedy = '{"model": "base", "prompt": "Hello there", "max_tokens": 12, "temperature": 0, "logprobs": 1}'
    statuses: Counter[int] = Counter()
    numbers, lock, over = iter(range(NUM_SETS)), threading.Lock(), threading.Event()

    with serving(tiny_base) as (url, engine):

        def send() -> None:
            with httpx.Client(base_url=url, timeout=120) as client:
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    path, body = random_body(random.Random(number))
                    status, values = _answer_of(client, path, body)
                    with lock:
                        statuses[status] += 1
                    assert status in (200, 400), (number, body[:600], values)
                    if status == 400:
                        assert values[0]["error"]["message"], body[:600]
                    else:
                        assert not any("error" in value for value in values), (number, body[:600], values)

        def neighbour() -> list[Any]:
            with httpx.Client(base_url=url, timeout=120) as client:
                answers = []
                while not over.is_set() or len(answers) < 2:
                    _, (value,) = _answer_of(client, "/v1/completions", greedy)
                    answers.append([value["choices"][0]["text"], value["choices"][0]["logprobs"]["tokens"]])
                return answers

        with ThreadPoolExecutor(NUM_CLIENTS + 1) as threads:
            over.set()
            alone = neighbour()[0]
            over.clear()
            beside = threads.submit(neighbour)
            sent = [threads.submit(send) for _ in range(NUM_CLIENTS)]
            try:
                for one in sent:
                    one.result()
            finally:
                over.set()
            assert all(answer == alone for answer in beside.result())
        assert httpx.get(f"{url}/ready").status_code == 200
        assert sum(statuses.values()) == NUM_SETS
        assert min(statuses[200], statuses[400]) > NUM_SETS / 10
        asyncio.run(engine.unload("sha256:nobody"))  # every abort before it is obeyed
        engine.check()
