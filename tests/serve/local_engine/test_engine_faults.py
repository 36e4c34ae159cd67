"""What the engine refuses, and what it does when something breaks under it."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_runs import GREEDY, NUM_TOKENS, PROMPTS, ask, idle, load_tiny, run, running, tokens_of, unverified
from tiny_models import TINY_VOCABULARY, make_peft_adapter, make_tiny_base

from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.bases.store import fingerprint
from adapterhub.errors import (
    AdapterLoadFailed,
    AdapterNoEffect,
    AdapterUnsupported,
    EngineStopped,
    IncompatibleBase,
    InvalidTensors,
    RankTooLarge,
    RequestTooLong,
    ServerBusy,
    UsageError,
)
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.adapters.catalog import Catalog
from serve.api.app import create_app
from serve.api.auth import ApiKeys
from serve.api.metrics import Metrics
from serve.api.prompts import PromptRenderer
from serve.api.services import Services
from serve.config import LocalEngineConfig, SchedulerLimits
from serve.engine import AdapterScale, GenerationRequest
from serve.local_engine.engine import LocalEngine
from serve.local_engine.scheduler import Batch


@pytest.fixture(scope="module")
def adapter(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """LoRA of rank 16 on all linear layers."""
    folder = tmp_path_factory.mktemp("adapter") / "sixteen"
    make_peft_adapter(folder, tiny_base, rank=16, seed=0)
    return unverified(folder, 0)


def test_a_closed_stream_is_aborted_within_one_step_and_leaves_nothing(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            steps: list[Batch] = []
            compute = engine._runner.run

            def counted(batch: Batch) -> Any:
                steps.append(batch)
                return compute(batch)

            monkeypatch.setattr(engine._runner, "run", counted)
            stream = engine.generate(GenerationRequest("a", PROMPTS[0], replace(GREEDY, max_tokens=400)))
            await anext(stream)
            await stream.aclose()
            begun = len(steps)
            await idle(engine)
            assert len(steps) <= begun + 1  # the one that was being computed, or was about to be

    run(test)


def test_a_prompt_that_is_too_long_shows_both_numbers(tiny_base: StoredBase) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base), LocalEngineConfig(max_model_len=20)) as engine:
            with pytest.raises(RequestTooLong, match=r"24 tokens.*12.*20"):
                await ask(engine, GenerationRequest("a", PROMPTS[3], GREEDY))

    run(test)


@pytest.mark.parametrize("token", [1_000_000_000, TINY_VOCABULARY, -1])
def test_a_prompt_token_outside_the_vocabulary_is_refused(tiny_base: StoredBase, token: int) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            with pytest.raises(
                UsageError, match=f"the prompt names token {token}, the vocabulary has {TINY_VOCABULARY} tokens"
            ):
                await ask(engine, GenerationRequest("a", (5, token), GREEDY))
            assert len(tokens_of(await ask(engine, GenerationRequest("b", (5,), GREEDY)))) == NUM_TOKENS

    run(test)


def test_an_id_that_is_taken_harms_neither_the_first_nor_the_engine(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            alone = tokens_of(await ask(engine, GenerationRequest("a", PROMPTS[1], GREEDY)))
            step = _Held(engine, monkeypatch)
            first = asyncio.ensure_future(ask(engine, GenerationRequest("a", PROMPTS[1], GREEDY)))
            await asyncio.to_thread(step.begun.wait)
            second = asyncio.ensure_future(ask(engine, GenerationRequest("a", PROMPTS[0], GREEDY)))
            await _commanded(engine, 1)
            step.may_continue.set()
            with pytest.raises(UsageError, match="request a is being answered already"):
                await second
            assert tokens_of(await first) == alone
            await idle(engine)

    run(test)


def test_a_full_queue_says_the_server_is_busy(tiny_base: StoredBase) -> None:
    async def test() -> None:
        config = LocalEngineConfig(max_queue=1, limits=SchedulerLimits(max_num_seqs=1))
        async with running(load_tiny(tiny_base), config) as engine:
            long = replace(GREEDY, max_tokens=400)
            streams = [engine.generate(GenerationRequest(str(n), PROMPTS[0], long)) for n in range(2)]
            await anext(streams[0])
            waiting = asyncio.ensure_future(anext(streams[1]))
            while engine.status().num_waiting == 0:
                await asyncio.sleep(0.001)
            with pytest.raises(ServerBusy):
                await ask(engine, GenerationRequest("third", PROMPTS[0], GREEDY))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    run(test)


def test_an_adapter_that_is_not_loaded_is_never_answered_by_the_base(tiny_base: StoredBase) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            with pytest.raises(AdapterLoadFailed, match="not loaded"):
                await ask(engine, GenerationRequest("a", PROMPTS[0], GREEDY, (AdapterScale("sha256:none"),)))

    run(test)


def _refusal(base: StoredBase, adapter: Adapter, error: type[Exception], match: str, **config: int) -> None:
    async def test() -> None:
        async with running(load_tiny(base), LocalEngineConfig(**config)) as engine:
            with pytest.raises(error, match=match):
                await engine.load(adapter)
            assert engine.status().ready

    run(test)


def test_an_adapter_of_a_deeper_base_is_refused(smollm2: StoredBase, tiny_base: StoredBase, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    make_tiny_base(tmp_path / "base", smollm2, layers=3, seed=0)
    deeper = StoredBase(tmp_path / "base", BaseRef("deeper", None, fingerprint(tmp_path / "base")))
    make_peft_adapter(tmp_path / "adapter", deeper, rank=4, seed=0)
    _refusal(tiny_base, unverified(tmp_path / "adapter", 1), IncompatibleBase, "layers.2")


def test_an_adapter_of_another_width_is_refused(smollm2: StoredBase, tiny_base: StoredBase, tmp_path: Path) -> None:
    make_peft_adapter(tmp_path / "adapter", smollm2, rank=4, seed=0, target_modules=["layers.0.self_attn.q_proj"])
    _refusal(tiny_base, unverified(tmp_path / "adapter", 1), IncompatibleBase, "576")


def test_an_adapter_that_touches_no_layer_is_refused(tiny_base: StoredBase, tmp_path: Path) -> None:
    from packages import write_peft_folder
    from safetensors.numpy import load_file, save_file

    folder = write_peft_folder(tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace("self_attn", "attention"): value for key, value in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    _refusal(tiny_base, unverified(folder, 1), AdapterNoEffect, "another architecture")


def test_too_large_a_rank_is_refused(tiny_base: StoredBase, adapter: Adapter) -> None:
    _refusal(tiny_base, adapter, RankTooLarge, "--max-lora-rank 16", max_lora_rank=8)


def test_a_whole_layer_that_is_neither_embedding_nor_head_is_refused(tiny_base: StoredBase, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp.down_proj"]}
    make_peft_adapter(tmp_path / "adapter", tiny_base, rank=4, seed=0, **options)
    _refusal(tiny_base, unverified(tmp_path / "adapter", 1), AdapterUnsupported, r"down_proj \(modules_to_save\)")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_whole_weights_that_lie_the_other_way_round_are_refused(
    tiny_base: StoredBase, tmp_path: Path, module: str
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "adapter"
    make_peft_adapter(folder, tiny_base, rank=4, seed=0, target_modules=["v_proj"], modules_to_save=[module])
    tensors = load_file(folder / "adapter_model.safetensors")
    turned = {key: value.T.copy() if f"{module}.weight" in key else value for key, value in tensors.items()}
    save_file(turned, folder / "adapter_model.safetensors")
    _refusal(tiny_base, unverified(folder, 1), IncompatibleBase, "save it transposed")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("target", "renamed", "message"),
    [
        ("embed_tokens", {"lora_embedding_A": "lora_A.weight", "lora_embedding_B": "lora_B.weight"}, "a linear layer"),
        ("q_proj", {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}, "an embedding"),
    ],
)
def test_an_update_of_the_other_kind_of_layer_is_refused(
    tiny_base: StoredBase, tmp_path: Path, target: str, renamed: dict[str, str], message: str
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "adapter"
    make_peft_adapter(folder, tiny_base, rank=4, seed=0, target_modules=[target])
    tensors = load_file(folder / "adapter_model.safetensors")
    for old, new in renamed.items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    _refusal(tiny_base, unverified(folder, 1), AdapterUnsupported, f"has tensors of {message}")


def _without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [_without_weights, shutil.rmtree], ids=["the weights", "the folder"])
def test_an_adapter_gone_from_disk_while_its_request_waits_is_reported(
    tiny_base: StoredBase, adapter: Adapter, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    async def test() -> None:
        gone = unverified(shutil.copytree(adapter.path, tmp_path / "gone"), 1)
        async with running(load_tiny(tiny_base)) as engine:
            cache = AdapterCache(1, load=engine.load, unload=engine.unload)

            async def answer(one: Adapter) -> list[int]:
                async with cache.lease([one]):
                    request = GenerationRequest(one.digest, PROMPTS[0], GREEDY, (AdapterScale(one.digest),))
                    return tokens_of(await ask(engine, request))

            async with cache.lease([adapter]):  # the only slot
                waiting = asyncio.ensure_future(answer(gone))
                await asyncio.sleep(0)
                spoil(gone.path)
            with pytest.raises(AdapterLoadFailed, match="pull it again"):
                await waiting
            assert cache.resident == ()
            assert len(await answer(adapter)) == GREEDY.max_tokens
            await idle(engine)
            cache.check()

    run(test)


def test_a_load_that_fails_half_way_leaves_nothing_and_can_be_tried_again(
    tiny_base: StoredBase, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            bank = engine._runner.adapters
            last = bank.groups[-2]  # the last group of layers before the head
            with monkeypatch.context() as patched:

                def no_memory(*_: object) -> None:
                    raise MemoryError("no more")

                patched.setattr(last, "install", no_memory)
                with pytest.raises(MemoryError):
                    await engine.load(adapter)
            assert not bank.is_resident(adapter.digest)
            assert all(not group.updates(adapter.digest) for group in bank.groups)

            async def answer(*mix: AdapterScale) -> list[int]:
                return tokens_of(await ask(engine, GenerationRequest("a", PROMPTS[2], GREEDY, mix)))

            before = await answer()
            await engine.load(adapter)
            once = await answer(AdapterScale(adapter.digest))
            await engine.unload(adapter.digest)
            assert await answer() == before
            await engine.load(adapter)
            assert await answer(AdapterScale(adapter.digest)) == once != before

    run(test)


def test_a_file_cut_short_is_refused(tiny_base: StoredBase, adapter: Adapter, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter.path, tmp_path / "short")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    _refusal(tiny_base, unverified(folder, 1), InvalidTensors, "damaged")


def test_a_dying_worker_fails_requests_and_readiness_and_hangs_nobody(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:

            def broken(batch: object) -> None:
                raise MemoryError("no more")

            monkeypatch.setattr(engine._runner, "run", broken)
            with pytest.raises(EngineStopped, match="no more"):
                await ask(engine, GenerationRequest("a", PROMPTS[0], GREEDY))
            assert not engine.status().ready
            with pytest.raises(EngineStopped):
                await ask(engine, GenerationRequest("b", PROMPTS[0], GREEDY))
            with pytest.raises(EngineStopped):
                await engine.unload("x")

    run(test)


class _Held:
    """The engine's next step waits, once `begun`, for `may_continue`; then it fails with `error`, if there is one."""

    def __init__(self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.begun, self.may_continue = threading.Event(), threading.Event()
        compute = engine._runner.run

        def held(batch: Batch) -> Any:
            self.begun.set()
            self.may_continue.wait()
            if error is not None:
                raise error
            return compute(batch)

        monkeypatch.setattr(engine._runner, "run", held)


async def _commanded(engine: LocalEngine, count: int) -> None:
    """Wait until the worker has that many commands before it."""
    while engine._commands.qsize() < count:
        await asyncio.sleep(0.001)


def test_what_arrives_while_the_dying_step_runs_gets_the_error(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            step = _Held(engine, monkeypatch, MemoryError("no more"))
            first = asyncio.ensure_future(ask(engine, GenerationRequest("a", PROMPTS[0], GREEDY)))
            await asyncio.to_thread(step.begun.wait)
            late = [
                asyncio.ensure_future(work)
                for work in (ask(engine, GenerationRequest("b", PROMPTS[0], GREEDY)), engine.unload("x"))
            ]
            await _commanded(engine, 2)
            step.may_continue.set()
            for told in (first, *late):
                with pytest.raises(EngineStopped, match="no more"):
                    await asyncio.wait_for(told, 10)

    run(test)


def test_an_unload_given_up_while_a_step_runs_harms_nobody(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            step = _Held(engine, monkeypatch)
            answer = asyncio.ensure_future(ask(engine, GenerationRequest("a", PROMPTS[0], GREEDY)))
            await asyncio.to_thread(step.begun.wait)
            unloading = asyncio.ensure_future(engine.unload("sha256:nobody"))
            await _commanded(engine, 1)
            unloading.cancel()
            await asyncio.gather(unloading, return_exceptions=True)
            step.may_continue.set()
            assert len(tokens_of(await answer)) == NUM_TOKENS
            await idle(engine)

    run(test)


def test_a_token_of_the_tokenizer_that_the_model_has_not_is_a_bad_request(tiny_base: StoredBase) -> None:
    async def test() -> None:
        base = load_tiny(tiny_base)
        base.tokenizer.add_tokens(["<one more>"])
        async with running(base) as engine:
            cache = AdapterCache(1, load=engine.load, unload=engine.unload)
            catalog = Catalog(tiny_base, "base", Registry(tiny_base.path), cache)
            services = Services(engine, catalog, cache, PromptRenderer(base.tokenizer), Metrics(engine))
            transport = httpx.ASGITransport(create_app(services, ApiKeys()))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                for prompt, status in (([TINY_VOCABULARY], 400), ([TINY_VOCABULARY + 1], 400), ([5], 200)):
                    answer = await client.post("/v1/completions", json={"model": "base", "prompt": prompt})
                    assert answer.status_code == status, answer.text

    run(test)
