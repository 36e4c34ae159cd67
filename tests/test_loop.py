"""Serve -> vote -> train -> serve: what people say of answers makes a candidate that answers as they like."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapterhub.adapter import AdapterRef
from adapterhub.base_model import load_base
from adapterhub.base_store import StoredBase
from adapterhub.cli import app
from adapterhub.package import open_adapter, pack
from adapterhub.registry import Registry
from adapterhub.run_record import read_run_record
from serve.adapter_cache import AdapterCache
from serve.answer import Services
from serve.api import create_app
from serve.auth import ApiKeys
from serve.catalog import Catalog
from serve.feedback import STORE_NAME, FeedbackStore
from serve.local_engine import LocalEngine
from serve.metrics import Metrics
from serve.prompt import PromptRenderer
from train.recipe import Recipe
from train.sources import read_chatterbot
from train.trainer import fit

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
QUESTIONS = 28


@pytest.fixture
def at_home(home: Path, smollm2: StoredBase) -> Path:
    """A home of this test's own that has the base."""
    shutil.copytree(smollm2.path, home / "bases" / smollm2.path.name, copy_function=os.link)
    return home


@asynccontextmanager
async def serving(base: StoredBase, registry: Registry, names: list[str]) -> AsyncIterator[httpx.AsyncClient]:
    """The real engine behind the real API."""
    loaded = load_base(base, purpose="serve", dtype="float32")
    engine = LocalEngine(loaded)
    cache = AdapterCache(4, load=engine.load, unload=engine.unload)
    catalog = Catalog(base, "base", registry, cache)
    for name in names:
        await catalog.load(name, AdapterRef.parse(name))
    feedback = FeedbackStore(registry.root / STORE_NAME)
    services = Services(
        engine, catalog, cache, PromptRenderer(loaded.tokenizer), Metrics(engine), feedback=feedback
    )  # fmt: skip
    transport = httpx.ASGITransport(create_app(services, ApiKeys()))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            yield client
    finally:
        await engine.close()


def test_votes_and_corrections_make_a_better_adapter(at_home: Path, smollm2: StoredBase, tmp_path: Path) -> None:
    first = _trained(smollm2, tmp_path / "captain")
    registry = Registry(at_home)
    registry.add(first, name="captain")
    questions = [talk.messages[0].content for talk in read_chatterbot("trivia").examples[:QUESTIONS]]

    async def judge() -> None:
        """A visitor who wants every answer to begin the same way, and says so of two in three."""
        async with serving(smollm2, registry, ["captain"]) as client:
            for number, question in enumerate(questions):
                messages = [{"role": "user", "content": question}]
                if number % 3 == 0:
                    await _vote(client, messages)
                    continue
                given = await _ask(client, "captain", messages)
                body = {"kind": "correction", "messages": messages, "answer": given, "text": _liked(given["text"])}
                assert (await client.post("/v1/feedback", json=body)).status_code == 201
            assert (await client.get("/v1/ratings")).json()["ratings"]

    asyncio.run(judge())
    out = tmp_path / "candidate"
    command = ["improve", "captain", "-o", str(out), "--steps", "8", "--learning-rate", "1e-3", "--promote"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    candidate = open_adapter(out)
    record = read_run_record(out)
    assert record is not None
    tuned = record.evaluations[0].preference
    assert tuned is not None
    assert tuned.accuracy_after > tuned.accuracy_before
    assert tuned.loss_after < tuned.loss_before
    assert registry.resolve(AdapterRef.parse("captain")).digest == candidate.digest != first.digest

    async def look() -> None:
        async with serving(smollm2, registry, ["captain"]) as client:
            card = (await client.get("/v1/models/captain")).json()
            assert card["digest"] == candidate.digest
            assert (await _ask(client, "captain", [{"role": "user", "content": questions[0]}]))["text"]

    asyncio.run(look())


def _trained(base: StoredBase, folder: Path) -> Any:
    """A few steps on the captain's dialogues."""
    recipe = Recipe.model_validate(
        {
            "name": "captain", "base": "smollm2-135m-instruct",
            "data": {"source": "shipped", "name": "captain", "max_length": 128},
            "lora": {"rank": 8}, "train": {"steps": 2, "batch_size": 4},
        }
    )  # fmt: skip
    fit(recipe, base, folder)
    return pack(folder, base=base, name="captain")


def _liked(text: str) -> str:
    return f"Aye, mate! {text}"


async def _ask(client: httpx.AsyncClient, model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
    answered = await client.post("/v1/chat/completions", json=body)
    assert answered.status_code == 200, answered.text
    return {"model": model, "digest": None, "text": answered.json()["choices"][0]["message"]["content"] or "..."}


async def _vote(client: httpx.AsyncClient, messages: list[dict[str, str]]) -> None:
    battle = (await client.post("/v1/arena/battles", json={})).json()
    sides = {side: await _ask(client, battle[side], messages) for side in ("a", "b")}
    better = "a" if sides["a"]["model"] == "captain" else "b"
    sides[better]["text"] = _liked(sides[better]["text"])
    body = {"kind": "vote", "battle": battle["battle"], "messages": messages, **sides, "winner": better}
    answered = await client.post("/v1/feedback", json=body)
    assert answered.status_code == 201, json.dumps(answered.json())
