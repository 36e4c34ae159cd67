"""What the tests of vLLM share: fakes on ports, an engine over them; processes looked at from outside."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from conftest import free_port
from fake_vllm import FakeVllm, answer_of

from adapterhub.adapter import Adapter
from adapterhub.base_store import StoredBase
from adapterhub.files import sha256_of
from serve.engine import AdapterScale, GenerationRequest, Precision, SamplingParams
from serve.vllm_engine import VllmEngine


class Words:
    """A tokenizer that spells a token as its number."""

    def decode(self, tokens: list[int]) -> str:
        return f"<{tokens[0]}>"


@dataclass
class Running:
    fake: FakeVllm
    url: str


@contextmanager
def fakes() -> Iterator[Callable[..., Running]]:
    """Starts fakes on loopback ports, each on a thread of its own, until the block ends."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(fake: FakeVllm, port: int | None = None) -> Running:
        port = port or free_port()
        config = uvicorn.Config(fake.app(), host="127.0.0.1", port=port, log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        servers.append((server, thread))
        return Running(fake, f"http://127.0.0.1:{port}")

    yield start
    for server, thread in servers:
        server.force_exit = server.should_exit = True
        thread.join(timeout=10)


@asynccontextmanager
async def engine_on(base: StoredBase, folder: Path, *urls: str, **options: object) -> AsyncIterator[VllmEngine]:
    settings = {"max_lora_rank": 64, "precision": Precision("float32", "float32"), "report": lambda line: None}
    engine = await VllmEngine.start(
        base, "base", Words(), endpoints=urls, folder=folder / "kept", **(settings | options)
    )
    try:
        yield engine
    finally:
        await engine.close()


def fake_of(base: StoredBase, **options: object) -> FakeVllm:
    return FakeVllm(root=str(base.path), **options)  # type: ignore[arg-type]


async def ask(engine: VllmEngine, adapter: Adapter | None = None, **sampling: object) -> list:  # type: ignore[type-arg]
    mix = () if adapter is None else (AdapterScale(adapter.digest),)
    settings = {"max_tokens": 4, "temperature": 0.0} | sampling
    request = GenerationRequest("r", (5, 6, 7), SamplingParams(**settings), mix)  # type: ignore[arg-type]
    return [chunk async for chunk in engine.generate(request)]


def tokens_of(chunks: list) -> list[int]:  # type: ignore[type-arg]
    return [token for chunk in chunks for token in chunk.tokens]


def expected(adapter: Adapter | None) -> list[int]:
    digest = "" if adapter is None else sha256_of(adapter.path / "adapter_model.safetensors").removeprefix("sha256:")
    return answer_of(digest, [5, 6, 7], 4)


def run(work: object) -> None:
    asyncio.run(work)  # type: ignore[arg-type]


async def until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so"
        await asyncio.sleep(0.02)


def processes_under(pid: int) -> list[int]:
    """Descendants, parents first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    found = [int(child) for child in children]
    return found + [below for child in found for below in processes_under(child)]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
