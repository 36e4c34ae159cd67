"""A vLLM of our own: found, started, ended with us; and which engine is chosen, with the reason."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fake_vllm import environment
from tiny_models import make_peft_adapter
from vllm_fixtures import (
    Running,
    ask,
    engine_on,
    expected,
    fake_of,
    fakes,
    is_alive,
    processes_under,
    run,
    tokens_of,
    until,
)

from adapterhub.adapter import Adapter, AdapterRef, BaseName, BaseRef, StoredBase
from adapterhub.errors import EngineStopped, UsageError
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry
from serve import engine_choice as engines
from serve.config import EngineKind, ServeConfig, VllmConfig
from serve.engine_choice import choose_engine
from serve.vllm_engine import engine as vllm_engine
from serve.vllm_engine.client import VllmServer
from serve.vllm_engine.engine import name_of
from serve.vllm_engine.process import ChildOptions, VllmProcess, find_vllm


@pytest.fixture
def run_fake() -> Iterator[Callable[..., Running]]:
    with fakes() as start:
        yield start


@pytest.fixture(scope="module")
def packed(tiny_base: StoredBase, peft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = shutil.copytree(peft_folder, tmp_path_factory.mktemp("packed") / "a")
    return pack(folder, base=tiny_base, name="a")


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


def test_a_child_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    guard = Path(vllm_engine.__file__).with_name("guard.py")
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
            async with httpx.AsyncClient() as without_key:
                assert (await without_key.get(f"{server.url}/v1/models")).status_code == 401
            assert (await server.base_card())["id"] == "base"
        finally:
            await server.close()
            await asyncio.to_thread(process.stop)

    run(check())


def test_where_the_plugin_does_not_apply_the_base_is_asked_for_through_an_adapter(
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


def test_the_engine_is_chosen_by_name_with_a_reason(tmp_path: Path) -> None:
    base, registry = BaseName.parse("smollm2-135m-instruct"), Registry(tmp_path)
    assert "exact NF4 bits" in str(choose_engine(ServeConfig(base), registry))
    auto = choose_engine(ServeConfig(base, engine_kind=EngineKind.AUTO), registry)
    assert auto.value == "local"
    assert "GPU" in auto.reason
    endpoint = VllmConfig(endpoints=("http://127.0.0.1:1",))
    assert choose_engine(ServeConfig(base, engine_kind=EngineKind.AUTO, vllm=endpoint), registry).value == "vllm"


def test_on_a_gpu_auto_takes_vllm_if_it_serves_the_adapters_given(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_peft_adapter(tmp_path / "dora", tiny_base, rank=4, seed=3, use_dora=True)
    pack(tmp_path / "dora", base=tiny_base, name="dora")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    base, registry = BaseName.parse(str(tiny_base.path)), Registry(tmp_path)
    plain = ("plain", AdapterRef.parse(str(packed.path)))
    config = ServeConfig(base, (plain,), engine_kind=EngineKind.AUTO, vllm=VllmConfig(python=Path("python")))
    taken = choose_engine(config, registry)
    assert (taken.value, "serves the adapters" in taken.reason) == ("vllm", True)
    without = choose_engine(replace(config, vllm=VllmConfig()), registry)
    assert (without.value, "no vLLM" in without.reason) == ("local", True)
    dora = ("d", AdapterRef.parse(str(tmp_path / "dora")))
    refused = choose_engine(replace(config, adapters=(plain, dora)), registry)
    assert (refused.value, "adapter d uses DoRA" in refused.reason) == ("local", True)


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
        ({}, VllmConfig(endpoints=("http://127.0.0.1:1",)), "of a precision that its servers do not report"),
    ],
)  # fmt: skip
def test_how_the_base_is_quantized_is_shown(
    tmp_path: Path, stored: dict[str, str], vllm: VllmConfig, said: str
) -> None:
    config = {"quantization_config": stored} if stored else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = StoredBase(tmp_path, BaseRef("tests/held", None, "fp1:0"))
    asked = ServeConfig(BaseName.parse(str(tmp_path)), engine_kind=EngineKind.VLLM, vllm=vllm)
    precision = engines._precision(asked, base, "bfloat16")
    assert said in str(precision)
    assert (precision.weights == "nf4") == ("nf4" in said)


def test_what_killed_servers_left_goes_at_the_next_start(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for number in (gone.pid, os.getpid()):
        (tmp_path / str(number) / "adapters").mkdir(parents=True)
    engines._remove_stale_dirs(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [str(os.getpid())]
