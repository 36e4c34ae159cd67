"""vLLM as the engine, against a server that answers as vLLM 0.32 does; test_vllm_real.py asks the real one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import free_port, make_peft_adapter, make_tiny_base
from fake_vllm import FakeVllm, answer_of, environment

from adapterhub.adapter import Adapter, AdapterRef, BaseName, BaseRef
from adapterhub.base_store import StoredBase, fingerprint
from adapterhub.errors import (
    AdapterHubError,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterUnsupported,
    EngineStopped,
    IncompatibleBase,
    NotAuthorized,
    RankTooLarge,
    UsageError,
)
from adapterhub.files import sha256_of
from adapterhub.package import pack
from adapterhub.registry import Registry
from serve import engines, vllm_engine
from serve.config import ServeConfig, VllmConfig
from serve.engine import AdapterScale, Constraint, FinishReason, GenerationRequest, Precision, SamplingParams
from serve.engines import choose_engine
from serve.vllm_engine import VllmEngine, name_of
from serve.vllm_fit import module_shapes
from serve.vllm_process import ChildOptions, VllmProcess, find_vllm, rank_for
from serve.vllm_server import VllmServer
from serve.vllm_wire import body_of


class Words:
    """A tokenizer that spells a token as its number."""

    def decode(self, tokens: list[int]) -> str:
        return f"<{tokens[0]}>"


@dataclass
class Running:
    fake: FakeVllm
    url: str


@pytest.fixture
def run_fake() -> Iterator[Callable[..., Running]]:
    """Starts fakes on loopback ports, each on a thread of its own."""
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


@pytest.fixture(scope="session")
def packed(tiny_base: StoredBase, peft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("packed") / "a"
    shutil.copytree(peft_folder, folder)
    return pack(folder, base=tiny_base, name="a")


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


def test_answers_are_those_of_the_adapter_asked_for(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        running = run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            await engine.load(packed)
            assert list(running.fake.adapters) == [name_of(packed.digest)]
            chunks = await ask(engine, packed, top_logprobs=2)
            assert tokens_of(chunks) == expected(packed) != expected(None)
            assert [c.finish_reason for c in chunks] == [None, None, None, FinishReason.LENGTH]
            assert chunks[-1].num_tokens == 4
            assert chunks[-1].num_shared == 3
            first = chunks[0].logprobs[0]
            assert first.token == expected(packed)[0]
            assert first.text == f"<{first.token}>"
            assert [token for token, _, _ in first.top] == [first.token, first.token + 1]
            assert tokens_of(await ask(engine)) == expected(None)
            assert engine.max_model_len == 512
            await engine.unload(packed.digest)
            assert not running.fake.adapters
            assert not list((tmp_path / "kept").glob("sha256-*"))

    run(check())


def test_an_adapter_is_on_every_server_or_on_none(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        good, bad = run_fake(fake_of(tiny_base)), run_fake(fake_of(tiny_base, max_lora_rank=4))
        async with engine_on(tiny_base, tmp_path, good.url, bad.url) as engine:
            with pytest.raises(AdapterLoadFailed, match="LoRA rank 8 is greater"):
                await engine.load(packed)
            assert not good.fake.adapters
            bad.fake.max_lora_rank = 64
            await engine.load(packed)
            assert list(good.fake.adapters) == list(bad.fake.adapters) == [name_of(packed.digest)]

    run(check())


def test_the_adapters_own_folder_may_go_while_it_is_loaded(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        make_peft_adapter(tmp_path / "peft", tiny_base, rank=4, seed=9)
        adapter = pack(tmp_path / "peft", base=tiny_base, name="b")
        wanted = expected(adapter)
        running = run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            await engine.load(adapter)
            for file in adapter.path.iterdir():
                file.unlink()
            running.fake.adapters.clear()  # as after a restart: it must be read again
            assert tokens_of(await ask(engine, adapter)) == wanted

    run(check())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"use_dora": True}, AdapterUnsupported, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, AdapterUnsupported, "modules_to_save"),
        ({"rank": 16}, RankTooLarge, "rank 16"),
    ],
)
def test_what_vllm_cannot_serve_does_not_reach_it(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running], options: dict[str, object],
    error: type[Exception], words: str,
) -> None:  # fmt: skip
    async def check() -> None:
        make_peft_adapter(tmp_path / "peft", tiny_base, **({"rank": 4, "seed": 3} | options))  # type: ignore[arg-type]
        adapter = pack(tmp_path / "peft", base=tiny_base, name="b")
        running = run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, running.url, max_lora_rank=8) as engine:
            with pytest.raises(error, match=words):
                await engine.load(adapter)
            assert not running.fake.adapters

    run(check())


def test_an_adapter_of_a_deeper_base_is_refused(
    smollm2: StoredBase, tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        make_tiny_base(tmp_path / "deep", smollm2, layers=3, seed=0)
        deep = StoredBase(tmp_path / "deep", BaseRef("tests/deep", None, fingerprint(tmp_path / "deep")))
        make_peft_adapter(tmp_path / "peft", deep, rank=4, seed=3)
        adapter = pack(tmp_path / "peft", base=deep, name="b")
        async with engine_on(tiny_base, tmp_path, run_fake(fake_of(tiny_base)).url) as engine:
            with pytest.raises(IncompatibleBase, match="layers this base does not have"):
                await engine.load(adapter)

    run(check())


def test_shapes_are_the_models_own(tiny_base: StoredBase) -> None:
    shapes = module_shapes(tiny_base)
    assert shapes["model.layers.1.mlp.down_proj"] == (128, 64)
    assert shapes["model.layers.0.self_attn.k_proj"] == (64, 32)
    assert shapes["model.embed_tokens"] == (49152, 64)


def test_mixes_and_scales_are_refused(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        async with engine_on(tiny_base, tmp_path, run_fake(fake_of(tiny_base)).url) as engine:
            await engine.load(packed)
            request = GenerationRequest("r", (5,), SamplingParams(), (AdapterScale(packed.digest, 0.5),))
            with pytest.raises(UsageError, match="own scale"):
                await anext(engine.generate(request))

    run(check())


def test_what_vllm_refuses_is_passed_on(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        async with engine_on(tiny_base, tmp_path, run_fake(fake_of(tiny_base)).url) as engine:
            with pytest.raises(UsageError, match="temperature must be non-negative"):
                await ask(engine, temperature=-1.0)
            unloaded = GenerationRequest("r", (5,), SamplingParams(), (AdapterScale("sha256:" + "0" * 64),))
            with pytest.raises(AdapterNotFound):
                await anext(engine.generate(unloaded))

    run(check())


def test_leaving_early_aborts_the_answer(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        running = run_fake(fake_of(tiny_base, hold=True))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            async with aclosing(engine.generate(GenerationRequest("r", (5,), SamplingParams(max_tokens=9)))) as chunks:
                await anext(chunks)
                assert running.fake.open_answers == 1
                assert engine.status().num_running == 1
            for _ in range(200):
                if not running.fake.open_answers:
                    break
                await asyncio.sleep(0.02)
            assert running.fake.open_answers == 0
            assert engine.status().num_running == 0

    run(check())


def test_a_server_that_hangs_ends_its_answers_and_is_not_asked(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(vllm_engine, "WATCH_S", 0.05)
    monkeypatch.setattr(vllm_engine, "ANSWER_S", 0.3)

    async def check() -> None:
        running = run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            await engine.load(packed)
            running.fake.is_hanging = running.fake.hold = True
            with pytest.raises(EngineStopped, match="stopped answering"):
                await ask(engine, packed)
            assert not engine.status().ready
            assert not engine.status().has_ended
            with pytest.raises(EngineStopped, match="does not answer"):
                await ask(engine, packed)
            running.fake.adapters.clear()
            running.fake.is_hanging = running.fake.hold = False
            await until(lambda: engine.status().ready)
            assert list(running.fake.adapters) == [name_of(packed.digest)]  # had it before it was asked again
            assert tokens_of(await ask(engine, packed)) == expected(packed)

    run(check())


def test_a_server_that_is_healthy_and_gives_no_token_hangs(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "WATCH_S", 0.05)
    monkeypatch.setattr(vllm_engine, "STALLED_S", 0.3)

    async def check() -> None:
        running = run_fake(fake_of(tiny_base, hold=True))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            with pytest.raises(EngineStopped, match="stopped answering"):
                await ask(engine)
            running.fake.is_broken = True
            await until(lambda: not engine.status().ready)
            running.fake.is_broken = running.fake.hold = False
            await until(lambda: engine.status().ready)
            assert tokens_of(await ask(engine)) == expected(None)

    run(check())


def test_a_server_that_comes_back_with_another_base_is_not_asked(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(vllm_engine, "WATCH_S", 0.05)
    monkeypatch.setattr(vllm_engine, "ANSWER_S", 0.3)

    async def check() -> None:
        running = run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            await engine.load(packed)
            running.fake.is_hanging = True
            await until(lambda: not engine.status().ready)
            running.fake.base = running.fake.root = "other"
            running.fake.is_hanging = False
            await until(lambda: "serves other" in engine.status().reason)
            assert not engine.status().ready

    run(check())


def test_while_one_of_two_hangs_the_other_loads_and_answers(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(vllm_engine, "WATCH_S", 0.05)
    monkeypatch.setattr(vllm_engine, "ANSWER_S", 0.3)

    async def check() -> None:
        good, bad = run_fake(fake_of(tiny_base)), run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, good.url, bad.url) as engine:
            bad.fake.is_hanging = True
            await engine.load(packed)  # begins before the hang is noticed
            assert tokens_of(await ask(engine, packed)) == expected(packed)
            assert engine.status().ready
            bad.fake.is_hanging = False
            await until(lambda: engine.status().reason == "ready")
            assert list(bad.fake.adapters) == [name_of(packed.digest)]
            assert tokens_of(await ask(engine, packed)) == expected(packed)

    run(check())


def test_an_adapter_left_by_an_earlier_server_of_ours_is_loaded_anew(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    """Its folder went with that server, and vLLM dies when it must read it again."""

    async def check() -> None:
        running = run_fake(fake_of(tiny_base, adapters={name_of(packed.digest): "from a folder that is gone"}))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            await engine.load(packed)
            assert tokens_of(await ask(engine, packed)) == expected(packed)
        assert not running.fake.adapters  # nor do we leave any

    run(check())


async def until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"root": "/models/other", "base": "other"}, IncompatibleBase, "serves other"),
        ({"can_update": False}, UsageError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ({"has_lora": False}, AdapterLoadFailed, "--enable-lora"),
        ({"key": "secret"}, NotAuthorized, "ADAPTERHUB_VLLM_API_KEY"),
        ({"is_broken": True}, EngineStopped, "EngineCore encountered an issue"),
    ],
)
def test_an_unfit_endpoint_is_refused_at_the_start(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running], options: dict[str, object],
    error: type[AdapterHubError], words: str,
) -> None:  # fmt: skip
    async def check() -> None:
        running = run_fake(replace(fake_of(tiny_base), **options))  # type: ignore[arg-type]
        with pytest.raises(error, match=words):
            async with engine_on(tiny_base, tmp_path, running.url):
                pass

    run(check())


def test_a_wrong_address_is_refused_at_the_start(tiny_base: StoredBase, tmp_path: Path) -> None:
    async def check() -> None:
        with pytest.raises(EngineStopped, match="no vLLM server answers"):
            async with engine_on(tiny_base, tmp_path, f"http://127.0.0.1:{free_port()}"):
                pass

    run(check())


def test_a_website_is_no_vllm(tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]) -> None:
    async def check() -> None:
        url = run_fake(fake_of(tiny_base)).url
        with pytest.raises(AdapterHubError, match="vLLM"):
            async with engine_on(tiny_base, tmp_path, f"{url}/elsewhere"):
                pass

    run(check())


def test_a_key_that_no_longer_fits_is_not_the_clients_fault(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        running = run_fake(fake_of(tiny_base, key="old"))
        async with engine_on(tiny_base, tmp_path, running.url, key="old") as engine:
            running.fake.key = "new"
            with pytest.raises(EngineStopped, match="ADAPTERHUB_VLLM_API_KEY"):
                await ask(engine)

    run(check())


def test_an_unknown_version_is_said(tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]) -> None:
    async def check() -> None:
        said: list[str] = []
        running = run_fake(fake_of(tiny_base, version="0.99.1"))
        async with engine_on(tiny_base, tmp_path, running.url, report=said.append):
            assert any("0.99.1" in line and "0.32.0" in line for line in said)

    run(check())


def test_a_constraint_reaches_vllm_in_its_words() -> None:
    sampling = SamplingParams(constraint=Constraint("json_schema", '{"type":"object"}'), logit_bias=((7, 1.5),))
    body = body_of(GenerationRequest("r", (1,), sampling), "base")
    assert body["structured_outputs"] == {"json": '{"type":"object"}'}
    assert body["logit_bias"] == {"7": 1.5}


# A vLLM of our own


def child(base: StoredBase, folder: Path, **options: object) -> VllmProcess:
    found = find_vllm(environment(folder))
    settings = {"max_loras": 4, "max_lora_rank": 8, "max_num_seqs": 8, "dtype": "float32"} | options
    return VllmProcess(found, base, "base", ChildOptions(**settings), folder / "run")  # type: ignore[arg-type]


@pytest.mark.parametrize("victim", ["vLLM", "its guard"])
def test_a_child_that_dies_is_started_again_with_its_adapters(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    monkeypatch.setattr(vllm_engine, "WATCH_S", 0.1)

    async def check() -> None:
        process = child(tiny_base, tmp_path)
        async with engine_on(tiny_base, tmp_path, processes=[process]) as engine:
            await engine.load(packed)
            assert tokens_of(await ask(engine, packed)) == expected(packed)
            guard = process._child.pid  # type: ignore[union-attr]
            group = processes_under(guard)
            assert len(group) >= 2
            os.kill(group[0] if victim == "vLLM" else guard, signal.SIGKILL)
            await until(lambda: not engine.status().ready)
            await until(lambda: engine.status().ready, 60)
            assert tokens_of(await ask(engine, packed)) == expected(packed)
            await until(lambda: not any(is_alive(pid) for pid in group))
            left = processes_under(process._child.pid)  # type: ignore[union-attr]
        await until(lambda: not any(is_alive(pid) for pid in left))

    run(check())


def test_a_child_that_never_lasts_is_given_up(
    tiny_base: StoredBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "WATCH_S", 0.05)
    monkeypatch.setattr(vllm_engine, "MAX_STARTS", 2)

    async def check() -> None:
        process = child(tiny_base, tmp_path)
        async with engine_on(tiny_base, tmp_path, processes=[process]) as engine:
            begun = time.monotonic()
            for _ in range(3):
                await until(lambda: engine.status().ready)
                os.kill(process._child.pid, signal.SIGKILL)  # type: ignore[union-attr]
                await until(lambda: not engine.status().ready)
            await until(lambda: engine.status().has_ended)
            assert "2 times in a row" in engine.status().reason
            assert time.monotonic() - begun > 1  # the second time it waited first

    run(check())


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


def test_a_child_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    guard = Path(vllm_engine.__file__).with_name("vllm_guard.py")
    sleep = [sys.executable, "-c", "import time; time.sleep(99)"]
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, {str(guard)!r}, *{sleep!r}], "
        "stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(99)\n"
    )
    front = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while len(below := processes_under(front.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(below) == 2
    front.kill()
    front.wait()
    while any(is_alive(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in below)


def test_a_child_that_cannot_start_says_why(tiny_base: StoredBase, tmp_path: Path) -> None:
    async def check() -> None:
        with pytest.raises(EngineStopped, match="ValueError: told to fail"):
            await child(tiny_base, tmp_path, arguments=("--fail",)).start()

    run(check())


def test_a_child_is_closed_to_others(tiny_base: StoredBase, tmp_path: Path) -> None:
    async def check() -> None:
        process = child(tiny_base, tmp_path)
        server = await process.start()
        try:
            async with httpx.AsyncClient() as stranger:
                assert (await stranger.get(f"{server.url}/v1/models")).status_code == 401
            assert (await server.base_card())["id"] == "base"
        finally:
            await server.close()
            await asyncio.to_thread(process.stop)

    run(check())


def test_where_the_plugin_does_not_fit_the_base_is_asked_for_through_an_adapter(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, run_fake: Callable[..., Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows with no adapter at all are what the CPU build gets wrong."""
    for version, slots in (("0.32.0", 4), ("0.33.0", 5)):
        found = find_vllm(environment(tmp_path / version, version=version))
        assert found.takes_plugin == (version == "0.32.0")
        options = ChildOptions(max_loras=4, max_lora_rank=8, max_num_seqs=8, dtype="float32")
        process = VllmProcess(found, tiny_base, "base", options, tmp_path / version)
        assert process.slots == slots
        assert process.is_hazardous == (version == "0.33.0")
        running = run_fake(fake_of(tiny_base))

        async def started(running: Running = running) -> VllmServer:
            return VllmServer(running.url)

        monkeypatch.setattr(process, "start", started)
        monkeypatch.setattr(VllmProcess, "is_running", True)

        async def check(running: Running = running, process: VllmProcess = process, slots: int = slots) -> None:
            async with engine_on(tiny_base, tmp_path, processes=[process]) as engine:
                await engine.load(packed)
                running.fake.asked.clear()
                await ask(engine)
                await ask(engine, packed)
                stands_for_base = running.fake.asked[0]
                assert (stands_for_base == "base") == (slots == 4)
                assert stands_for_base == "base" or stands_for_base in running.fake.adapters
                assert running.fake.asked[1] == name_of(packed.digest)

        run(check())


def test_a_list_of_plugins_to_load_has_ours_added(
    tiny_base: StoredBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    given = child(tiny_base, tmp_path)._environment()
    assert given["VLLM_PLUGINS"] == "theirs,adapterhub_vllm_cpu_lora"


def test_a_python_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no vLLM"):
        find_vllm(Path(sys.executable))
    with pytest.raises(UsageError, match="does not run"):
        find_vllm(tmp_path / "nothing")


def test_the_nearest_rank_vllm_takes() -> None:
    assert [rank_for(rank) for rank in (1, 2, 8, 24, 300)] == [1, 8, 8, 32, 320]
    with pytest.raises(UsageError, match="512"):
        rank_for(513)


def test_the_engine_is_chosen_by_name_with_a_reason(tmp_path: Path) -> None:
    base, registry = BaseName.parse("smollm2-135m-instruct"), Registry(tmp_path)
    assert "exact NF4 bits" in str(choose_engine(ServeConfig(base), registry))
    auto = choose_engine(ServeConfig(base, engine_kind="auto"), registry)
    assert auto.value == "local"
    assert "GPU" in auto.reason
    endpoint = VllmConfig(endpoints=("http://127.0.0.1:1",))
    assert choose_engine(ServeConfig(base, engine_kind="auto", vllm=endpoint), registry).value == "vllm"
    with pytest.raises(UsageError, match="--endpoint belongs to vLLM"):
        choose_engine(ServeConfig(base, vllm=endpoint), registry)
    both = VllmConfig(endpoints=("http://127.0.0.1:1",), python=Path("python"))
    with pytest.raises(UsageError, match="--vllm-python is for a vLLM we start"):
        choose_engine(ServeConfig(base, engine_kind="vllm", vllm=both), registry)


def test_on_a_gpu_auto_takes_vllm_if_it_serves_the_adapters_given(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_peft_adapter(tmp_path / "dora", tiny_base, rank=4, seed=3, use_dora=True)
    pack(tmp_path / "dora", base=tiny_base, name="dora")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    base, registry = BaseName.parse(str(tiny_base.path)), Registry(tmp_path)
    plain = ("plain", AdapterRef.parse(str(packed.path)))
    config = ServeConfig(base, (plain,), engine_kind="auto", vllm=VllmConfig(python=Path("python")))
    taken = choose_engine(config, registry)
    assert (taken.value, "serves the adapters" in taken.reason) == ("vllm", True)
    without = choose_engine(replace(config, vllm=VllmConfig()), registry)
    assert (without.value, "no vLLM" in without.reason) == ("local", True)
    dora = ("d", AdapterRef.parse(str(tmp_path / "dora")))
    unfit = choose_engine(replace(config, adapters=(plain, dora)), registry)
    assert (unfit.value, "adapter d uses DoRA" in unfit.reason) == ("local", True)


@pytest.mark.parametrize(
    ("stored", "vllm", "said"),
    [
        ({}, VllmConfig(), "bfloat16 weights, computed in bfloat16"),
        ({}, VllmConfig(arguments=("--quantization", "bitsandbytes")), "nf4 weights, computed in bfloat16"),
        ({}, VllmConfig(arguments=("--quantization=bitsandbytes",)), "nf4 weights, computed in bfloat16"),
        ({"quant_method": "awq"}, VllmConfig(), "awq weights, computed in bfloat16"),
        (
            {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, VllmConfig(),
            "fp4 weights, computed in bfloat16",
        ),
        ({}, VllmConfig(endpoints=("http://127.0.0.1:1",)), "which they do not tell"),
    ],
)  # fmt: skip
def test_how_the_base_is_held_is_said(tmp_path: Path, stored: dict[str, str], vllm: VllmConfig, said: str) -> None:
    config = {"quantization_config": stored} if stored else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = StoredBase(tmp_path, BaseRef("tests/held", None, "fp1:0"))
    asked = ServeConfig(BaseName.parse(str(tmp_path)), engine_kind="vllm", vllm=vllm)
    precision = engines._precision(asked, base, "bfloat16")
    assert said in str(precision)
    assert (precision.weights == "nf4") == ("nf4" in said)


def test_what_killed_servers_left_goes_at_the_next_start(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for number in (gone.pid, os.getpid()):
        (tmp_path / str(number) / "adapters").mkdir(parents=True)
    engines._forget_the_dead(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [str(os.getpid())]
