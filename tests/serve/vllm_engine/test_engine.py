"""vLLM as the engine, against a server that answers as vLLM 0.32 does; test_real.py asks the real one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import TINY_VOCABULARY, free_port, make_peft_adapter, make_tiny_base
from vllm_fixtures import Running, ask, engine_on, expected, fake_of, fakes, run, tokens_of, until

from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.bases.store import fingerprint
from adapterhub.compatibility import module_shapes
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
from adapterhub.packer import pack
from serve.engine import AdapterScale, FinishReason, GenerationRequest, GuidedDecoding, SamplingParams
from serve.vllm_engine import engine as vllm_engine
from serve.vllm_engine.engine import name_of
from serve.vllm_engine.wire import body_of


@pytest.fixture
def run_fake() -> Iterator[Callable[..., Running]]:
    with fakes() as start:
        yield start


@pytest.fixture(scope="module")
def packed(tiny_base: StoredBase, peft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = shutil.copytree(peft_folder, tmp_path_factory.mktemp("packed") / "a")
    return pack(folder, base=tiny_base, name="a")


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
            assert chunks[-1].num_cached_tokens == 3
            first = chunks[0].logprobs[0]
            assert first.token == expected(packed)[0]
            assert first.text == f"<{first.token}>"
            assert [one.token for one in first.top] == [first.token, first.token + 1]
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
    assert shapes["model.embed_tokens"] == (TINY_VOCABULARY, 64)


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


def test_new_requests_do_not_hide_that_no_answer_continues(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        running = run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            (replica,) = engine._replicas
            running.fake.is_silent = True
            asked = [asyncio.create_task(ask(engine))]
            await until(lambda: running.fake.open_answers == 1)
            assert await engine._fault_of(replica) is None
            replica.moved_at -= vllm_engine.STALLED_S
            asked.append(asyncio.create_task(ask(engine)))
            await until(lambda: running.fake.open_answers == 2)
            assert "no token" in str(await engine._fault_of(replica))
            running.fake.is_silent = False
            assert [tokens_of(chunks) for chunks in await asyncio.gather(*asked)] == [expected(None)] * 2
            assert await engine._fault_of(replica) is None

    run(check())


def test_a_client_that_reads_no_further_is_no_stalled_server(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        running = run_fake(fake_of(tiny_base))
        async with engine_on(tiny_base, tmp_path, running.url) as engine:
            (replica,) = engine._replicas
            async with aclosing(engine.generate(GenerationRequest("r", (5, 6, 7), SamplingParams(max_tokens=4)))) as it:
                await anext(it)
                replica.moved_at -= vllm_engine.STALLED_S
                assert await engine._fault_of(replica) is None
                running.fake.is_silent = True
                asked = asyncio.create_task(ask(engine))
                await until(lambda: running.fake.open_answers > 0)
                assert await engine._fault_of(replica) is None
                running.fake.is_silent = False
                await asked

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


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_of_this_machine(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def check() -> None:
        async with engine_on(tiny_base, tmp_path, run_fake(fake_of(tiny_base)).url) as engine:
            assert tokens_of(await ask(engine)) == expected(None)

    run(check())


@pytest.mark.parametrize("ending", ["abort", "error"])
def test_an_answer_that_vllm_gave_up_is_no_complete_one(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running], ending: str
) -> None:
    async def check() -> None:
        async with engine_on(tiny_base, tmp_path, run_fake(fake_of(tiny_base, ending=ending)).url) as engine:
            with pytest.raises(EngineStopped, match=f"aborted the answer \\({ending}\\)"):
                await ask(engine)

    run(check())


def test_a_website_is_no_vllm(tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]) -> None:
    async def check() -> None:
        url = run_fake(fake_of(tiny_base)).url
        with pytest.raises(UsageError, match="is it a vLLM server"):
            async with engine_on(tiny_base, tmp_path, f"{url}/elsewhere"):
                pass

    run(check())


def test_a_key_that_vllm_no_longer_accepts_is_not_the_clients_fault(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        running = run_fake(fake_of(tiny_base, key="old"))
        async with engine_on(tiny_base, tmp_path, running.url, key="old") as engine:
            running.fake.key = "new"
            with pytest.raises(EngineStopped, match="ADAPTERHUB_VLLM_API_KEY"):
                await ask(engine)

    run(check())


def test_an_unknown_version_is_reported(
    tiny_base: StoredBase, tmp_path: Path, run_fake: Callable[..., Running]
) -> None:
    async def check() -> None:
        said: list[str] = []
        running = run_fake(fake_of(tiny_base, version="0.99.1"))
        async with engine_on(tiny_base, tmp_path, running.url, report=said.append):
            assert any("0.99.1" in line and "0.32.0" in line for line in said)

    run(check())


def test_guided_decoding_reaches_vllm_under_its_field_names() -> None:
    sampling = SamplingParams(
        guided_decoding=GuidedDecoding("json_schema", '{"type":"object"}'), logit_bias=((7, 1.5),)
    )
    body = body_of(GenerationRequest("r", (1,), sampling), "base")
    assert body["structured_outputs"] == {"json": '{"type":"object"}'}
    assert body["logit_bias"] == {"7": 1.5}
