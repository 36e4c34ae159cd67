"""What the tests of vLLM share: fakes on ports, an engine over them; processes looked at from outside."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fake_vllm import FakeVllm, answer_of
from tiny_models import free_port

from adapterhub.adapter import Adapter, StoredBase
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


@dataclass
class Served:
    url: str
    process: subprocess.Popen[bytes]
    home: Path
    folders: Path
    base: StoredBase

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120)

    def complete(self, model: str, prompt: list[int], **options: object) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
        return self.post("/v1/completions", {**body, "ignore_eos": True, **options})

    def tokens(self, model: str, prompt: list[int]) -> str:
        answer = self.complete(model, prompt)
        assert answer.status_code == 200, answer.text
        return whole_characters(answer.json()["choices"][0]["text"])

    def add(self, folder: Path, name: str) -> None:
        environment = os.environ | {"ADAPTERHUB_HOME": str(self.home)}
        command = [COMMAND, "add", str(folder), "--name", name]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    def load(self, name: str, path: str) -> httpx.Response:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


@contextmanager
def serving(base: StoredBase, root: Path, names: Sequence[str], *options: str) -> Iterator[Served]:
    """Our server on a vLLM of its own, with the adapters root/adapters/<name>; all of it ends, the hard way."""
    folders, home, url = root / "adapters", root / "home", f"http://127.0.0.1:{(port := free_port())}"
    adapters = [part for name in names for part in ("-a", f"{name}={folders / name}")]
    command = [COMMAND, "serve", "--base", str(base.path), *adapters, "--port", str(port), "--no-page"]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--engine", "vllm", "--vllm-python", str(PYTHON), *options],
            env=os.environ | {"ADAPTERHUB_HOME": str(home)}, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until_ready(url, process, root / "log")
        yield Served(url, process, home, folders, base)
    finally:
        below = processes_under(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while any(is_alive(pid) for pid in below):
            assert time.monotonic() < deadline, "vLLM outlived the server that started it"
            time.sleep(0.1)


def model_of(served: Served, name: str) -> str:
    return served.base.path.name if name == "base" else name


PYTHON = os.environ.get("ADAPTERHUB_VLLM_PYTHON")


TOKENS = 24


COMMAND = str(Path(sys.executable).with_name("adapterhub"))


def whole_characters(text: str) -> str:
    """Without half a character at the end, which vLLM keeps back and a tokenizer spells as U+FFFD."""
    return text.rstrip("\ufffd")


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
