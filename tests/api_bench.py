"""The API before a fake engine, called without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fake_engine import FakeEngine
from packages import FINGERPRINT, write_package

from adapterhub.adapter import AdapterRef, BaseRef, StoredBase
from adapterhub.package import open_adapter
from adapterhub.registry import Registry
from serve.adapter_cache import AdapterCache
from serve.api import create_app
from serve.auth import ApiKeys
from serve.body import HttpLimits
from serve.catalog import Catalog
from serve.feedback import FeedbackStore, Thumb
from serve.metrics import Metrics
from serve.prompt import PromptRenderer
from serve.services import Services

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True)
class Bench:
    client: httpx.AsyncClient
    engine: FakeEngine
    services: Services
    registry: Registry

    async def chat(self, **body: object) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={"model": "base", **HELLO, **body})


class FakeTokenizer:
    """One token a character; refuses an empty conversation as real templates do."""

    eos_token = "</s>"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message must be the user's")
        return str(options["chat_template"] or "")[:1] + "".join(m["content"] for m in messages)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def __len__(self) -> int:
        return 256


@asynccontextmanager
async def bench(
    tmp_path: Path, keys: ApiKeys | None = None, http: HttpLimits | None = None, **engine: Any
) -> AsyncIterator[Bench]:
    """A server with the adapters `captain` and `poet` published and `spare` in the registry."""
    registry = Registry(tmp_path / "home")
    for seed, name in enumerate(("captain", "poet", "spare")):
        registry.add(open_adapter(write_package(tmp_path / name, name=name, seed=seed)))
    registry.add(open_adapter(write_package(tmp_path / "captain2", name="captain2", seed=9)))
    fake = FakeEngine(**engine)
    cache = AdapterCache(8, load=fake.load, unload=fake.unload)
    catalog = Catalog(StoredBase(tmp_path, BaseRef("owner/base", None, FINGERPRINT)), "base", registry, cache)
    feedback = FeedbackStore(tmp_path / "feedback.sqlite")
    services = Services(
        fake, catalog, cache, PromptRenderer(FakeTokenizer()), Metrics(fake), feedback=feedback, registry=registry
    )
    for name in ("captain", "poet"):
        await catalog.load(name, AdapterRef.parse(name))
    app = create_app(services, keys or ApiKeys(), http)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield Bench(client, fake, services, registry)
    cache.check()


def run(tmp_path: Path, test: Callable[[Bench], Awaitable[None]], keys: ApiKeys | None = None, **engine: Any) -> None:
    async def whole() -> None:
        async with bench(tmp_path, keys, **engine) as b:
            await asyncio.wait_for(test(b), 20)

    asyncio.run(whole())


def thumb(direction: str = "up") -> Thumb:
    return Thumb.model_validate({"kind": "thumb", "messages": ASKED, "answer": answer(), "thumb": direction})


ASKED = HELLO["messages"]


def answer(model: str = "captain", text: str = "Aye.") -> dict[str, Any]:
    return {"model": model, "digest": None, "text": text}
