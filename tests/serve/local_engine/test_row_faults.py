"""A fault while one request is computed ends that request, with its reason, and changes no other's tokens."""

from __future__ import annotations

import asyncio
import json
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_runs import GREEDY, NUM_TOKENS, PROMPTS, ask, idle, load_tiny, run, running, tokens_of, unverified
from safetensors.torch import load_file, save_file
from tiny_models import make_peft_adapter

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.choice import Choice
from adapterhub.errors import AdapterHubError, EngineStopped, NonFiniteLogits, RequestFailed
from adapterhub.package.lora_config import WEIGHTS_NAME
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.adapters.catalog import Catalog
from serve.api.app import create_app
from serve.api.auth import ApiKeys
from serve.api.completions import _merged
from serve.api.metrics import Metrics
from serve.api.prompts import PromptRenderer
from serve.api.services import Services
from serve.config import LocalEngineConfig, SchedulerLimits
from serve.engine import AdapterScale, Delta, GenerationRequest, GuidedDecoding, SamplingParams
from serve.local_engine import model_runner
from serve.local_engine.attention import PagedStep, _Prefill
from serve.local_engine.detokenizer import Detokenizer
from serve.local_engine.engine import LocalEngine
from serve.local_engine.guided_decoding import Matcher
from serve.local_engine.lora_layers import AdapterBank
from serve.local_engine.running_answer import RunningAnswer
from serve.local_engine.sampling import Sampler
from serve.local_engine.scheduler import Batch

NEIGHBOURS = (0, 2, 4)
"""prompts, of unlike lengths"""


class Panic(BaseException):
    """As PyO3's, of a Rust library that failed: no Exception."""


@pytest.fixture(scope="module")
def adapter(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("adapter") / "small"
    make_peft_adapter(folder, tiny_base, rank=4, seed=0)
    return unverified(folder, 0)


@pytest.fixture(scope="module")
def shared(tiny_base: StoredBase) -> Iterator[LocalEngine]:
    """Start one engine for all tests of faults: each fault of a request must leave it as it was."""
    engine = LocalEngine(load_tiny(tiny_base))
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def overflowing(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Finite weights whose products are not."""
    return unverified(_overflowing(adapter, tmp_path_factory.mktemp("adapter") / "huge"), 1)


def _overflowing(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    tensors = load_file(adapter.path / WEIGHTS_NAME)
    huge = {name: value * 1e30 if "lora_B" in name else value for name, value in tensors.items()}
    save_file(huge, folder / WEIGHTS_NAME)
    (folder / "adapter_config.json").write_bytes((adapter.path / "adapter_config.json").read_bytes())
    return folder


@pytest.fixture(params=["own", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        _use_torch(monkeypatch)


def _use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "load_kernels", lambda: (None, Choice("cpu kernels", "torch", "a test")))


async def _neighbours(engine: LocalEngine, name: str = "neighbour") -> list[list[int]]:
    """Greedy answers of the base, in one batch; of unlike lengths, so that some outlive what fails beside them."""
    requests = [GenerationRequest(f"{name} {number}", PROMPTS[number], GREEDY) for number in NEIGHBOURS]
    return [tokens_of(answer) for answer in await asyncio.gather(*(ask(engine, request) for request in requests))]


async def _fails_alone(engine: LocalEngine, request: GenerationRequest, *, right: list[list[int]]) -> AdapterHubError:
    """Return the error of `request`; its neighbors and later requests must be answered correctly."""
    error, beside = await asyncio.gather(ask(engine, request), _neighbours(engine), return_exceptions=True)
    assert isinstance(error, AdapterHubError), error
    assert beside == right
    await idle(engine)
    assert await _neighbours(engine, "after") == right
    assert engine.status().ready
    return error


BAD = SamplingParams(
    max_tokens=NUM_TOKENS,
    temperature=1,
    seed=1,
    top_logprobs=2,
    stop=("bad",),
    guided_decoding=GuidedDecoding("regex", ".*"),
)
"""Distinguished from its neighbors' parameters wherever only these are seen"""


def _is_bad_text(text: Detokenizer, *_: object) -> bool:
    return text._stop == BAD.stop


FAULTS: dict[str, tuple[type, str, Callable[..., bool]]] = {
    "sampling": (Sampler, "sample", lambda sampler, row, sequence, *_: sequence.request.id == "bad"),
    "the mask": (Matcher, "restrict", lambda *_: True),
    "taking a token": (Matcher, "accept", lambda *_: True),
    "the text": (Detokenizer, "feed", _is_bad_text),
    "the names of tokens": (Detokenizer, "name", _is_bad_text),
    "the delta": (RunningAnswer, "delta", lambda answer, *_: answer.sequence.request.id == "bad"),
}


@dataclass
class _Injected:
    """Replaces a method by itself, until it is called for the culprit the third time: then it raises."""

    call: Callable[..., Any]
    is_culprit: Callable[..., bool]
    error: BaseException
    times: int = 0

    def method(self) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if self.is_culprit(*arguments):
                self.times += 1
                if self.times == 3:
                    raise self.error
            return self.call(*arguments)

        return called


@pytest.mark.parametrize("error", [ValueError("broken"), Panic("broken")], ids=["Exception", "BaseException"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_while_one_request_is_answered_ends_that_one_alone(
    shared: LocalEngine, fault: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engine = shared
        right = await _neighbours(engine)
        owner, name, is_culprit = FAULTS[fault]
        monkeypatch.setattr(owner, name, _Injected(getattr(owner, name), is_culprit, error).method())
        found = await _fails_alone(engine, GenerationRequest("bad", PROMPTS[1], BAD), right=right)
        assert isinstance(found, RequestFailed)
        assert f"{type(error).__name__}: broken" in str(found)

    run(test)


def test_a_listener_that_cannot_be_notified_harms_nobody(shared: LocalEngine) -> None:
    async def test() -> None:
        engine = shared
        right = await _neighbours(engine)
        tried: list[Delta | Exception] = []

        def deaf(chunk: Delta | Exception) -> None:
            tried.append(chunk)
            raise Panic("nobody listens")

        answer = RunningAnswer(
            GenerationRequest("deaf", PROMPTS[1], GREEDY), engine._base.tokenizer.backend_tokenizer, None, deaf
        )
        engine._commands.put(lambda: engine._start(answer))
        assert await _neighbours(engine) == right
        await idle(engine)
        assert [type(one) for one in tried] == [Delta, RequestFailed]

    run(test)


def _breaks_with(digest: str, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the forward of every batch with this adapter fail."""
    begin = AdapterBank.begin

    def broken(bank: AdapterBank, batch: Batch) -> None:
        if any(digest in (one.digest for one in chunk.sequence.request.adapters) for chunk in batch.chunks):
            raise error
        begin(bank, batch)

    monkeypatch.setattr(AdapterBank, "begin", broken)


@pytest.mark.parametrize("error", [IndexError("rows"), Panic("rows"), MemoryError("rows")], ids=repr)
def test_a_forward_that_fails_ends_those_whose_adapter_breaks_it(
    tiny_base: StoredBase,
    adapter: Adapter,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        # Small chunks: it fails while neighbours are in the middle of their prompts, too.
        config = LocalEngineConfig(block_size=4, limits=SchedulerLimits(max_prefill_chunk=5))
        async with running(load_tiny(tiny_base), config) as engine:
            await engine.load(adapter)
            right = await _neighbours(engine)
            _breaks_with(adapter.digest, monkeypatch, error)
            request = GenerationRequest("bad", PROMPTS[3], GREEDY, (AdapterScale(adapter.digest),))
            assert isinstance(await _fails_alone(engine, request, right=right), RequestFailed)
            logged = [record.exc_info for record in caplog.records if record.message == "request bad failed"]
            assert "broken" in [frame.name for frame in traceback.extract_tb(logged[0][2])]  # type: ignore[index]
            with pytest.raises(RequestFailed, match="rows"):  # no neighbour shows whose fault it is
                await ask(engine, request)
            assert await _neighbours(engine) == right

    run(test)


def test_memory_that_suffices_for_each_alone_is_no_fault(shared: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        engine = shared
        right = await _neighbours(engine)
        begin = AdapterBank.begin

        def narrow(bank: AdapterBank, batch: Batch) -> None:
            if len(batch.chunks) > 1:
                raise MemoryError("too many at once")
            begin(bank, batch)

        monkeypatch.setattr(AdapterBank, "begin", narrow)
        assert await _neighbours(engine) == right

    run(test)


@pytest.mark.parametrize("error", [MemoryError("the device is lost"), Panic("the device is lost")], ids=repr)
def test_a_fault_of_the_whole_step_ends_the_engine_and_readiness_says_so(
    tiny_base: StoredBase, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:

            def broken(*_: object) -> None:
                raise error

            monkeypatch.setattr(AdapterBank, "begin", broken)
            told = await asyncio.gather(
                *(ask(engine, GenerationRequest(str(n), PROMPTS[n], GREEDY)) for n in range(3)), return_exceptions=True
            )
            assert [type(one) for one in told] == [EngineStopped] * 3
            status = engine.status()
            assert status.has_ended
            assert "the device is lost" in status.reason
            with pytest.raises(EngineStopped, match="the device is lost"):
                await ask(engine, GenerationRequest("later", PROMPTS[0], GREEDY))
            async with _client(tiny_base, engine) as client:
                assert (await client.get("/ready")).status_code == 503

    run(test)


KINDS_OF_ROWS = {
    "a prompt's beginning": (PagedStep, "prefills"),
    "the rest of a prompt": (_Prefill, "_make_mask"),
    "an answer": (PagedStep, "decode_mask"),
}


@pytest.mark.parametrize("kind", KINDS_OF_ROWS)
def test_a_base_that_cannot_compute_one_kind_of_rows_ends_the_engine(
    tiny_base: StoredBase, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would stay ready, and give every request an error."""
    _use_torch(monkeypatch)

    def broken(*_: object) -> None:
        raise RuntimeError("expected scalar type Float but found BFloat16")

    owner, name = KINDS_OF_ROWS[kind]

    async def test() -> None:
        config = LocalEngineConfig(limits=SchedulerLimits(max_prefill_chunk=5))
        async with running(load_tiny(tiny_base), config) as engine:
            # Now: what is broken at the start is found by the check of the base.
            monkeypatch.setattr(owner, name, property(broken) if name == "prefills" else broken)
            with pytest.raises(EngineStopped, match="found BFloat16"):
                await ask(engine, GenerationRequest("a", PROMPTS[2], GREEDY))
            assert engine.status().has_ended

    run(test)


@pytest.mark.usefixtures("kernels")
def test_an_adapter_that_overflows_ends_its_own_requests_and_leaves_no_nan_behind(
    tiny_base: StoredBase, overflowing: Adapter
) -> None:
    """Its NaN lie in the cache while neighbours run, and after it ended in the block that they are given next."""

    async def test() -> None:
        # Few blocks, so that those with NaN are used again.
        config = LocalEngineConfig(kv_cache_bytes=16 * 16 * 512, block_size=16)
        async with running(load_tiny(tiny_base), config) as engine:
            right = await _neighbours(engine)
            await engine.load(overflowing)
            request = GenerationRequest("bad", PROMPTS[3], GREEDY, (AdapterScale(overflowing.digest),))
            for temperature in (0.0, 1.0, 1.0):
                request = replace(request, sampling=replace(GREEDY, temperature=temperature))
                found = await _fails_alone(engine, request, right=right)
                assert isinstance(found, NonFiniteLogits)
                assert found.http_status == 422
                assert "token 1 of the answer" in str(found)
            zero = replace(request, adapters=(AdapterScale(overflowing.digest, 1e-36),))
            assert len(tokens_of(await ask(engine, zero))) == NUM_TOKENS

    run(test)


@pytest.mark.usefixtures("kernels")
def test_no_slot_of_another_sequence_is_read(tiny_base: StoredBase) -> None:
    """Every slot that nobody wrote holds NaN; rows of unlike lengths are padded to one."""

    async def test() -> None:
        async with running(load_tiny(tiny_base), LocalEngineConfig(kv_cache_bytes=64 * 16 * 512)) as engine:
            right = await _neighbours(engine)
        async with running(load_tiny(tiny_base), LocalEngineConfig(kv_cache_bytes=64 * 16 * 512)) as engine:
            engine._runner._cache.layers.fill_(torch.nan)
            assert await _neighbours(engine) == right

    run(test)


def _client(base: StoredBase, engine: LocalEngine) -> httpx.AsyncClient:
    cache = AdapterCache(4, load=engine.load, unload=engine.unload)
    catalog = Catalog(base, "base", Registry(base.path), cache)
    services = Services(engine, catalog, cache, PromptRenderer(engine._base.tokenizer), Metrics(engine))
    transport = httpx.ASGITransport(create_app(services, ApiKeys()))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)


A_TOKEN_THEN_NO_MORE = 'start: s\ns: "a" s'
"""a Lark grammar without an end, of which llguidance gives the first mask, and then no other"""


def test_a_stream_that_fails_half_way_gets_an_error_event_and_ends(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine, _client(tiny_base, engine) as client:
            body = {"model": "base", "prompt": "Hi", "max_tokens": 5, "temperature": 0, "logit_bias": {"2": -100}}
            body["structured_outputs"] = {"grammar": A_TOKEN_THEN_NO_MORE}
            whole = await client.post("/v1/completions", json=body)
            assert whole.status_code == 400
            assert whole.json()["error"]["code"] == "constraint_failed"
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                assert stream.status_code == 200
                events = [line.removeprefix("data: ") async for line in stream.aiter_lines() if line]
            assert json.loads(events[0])["choices"][0]["text"]
            assert json.loads(events[-2])["error"]["type"] == "invalid_request_error"
            assert events[-1] == "[DONE]"

            monkeypatch.setattr(Sampler, "sample", _Injected(Sampler.sample, lambda *_: True, Panic("x")).method())
            del body["structured_outputs"]
            async with client.stream("POST", "/v1/completions", json={**body, "n": 2, "stream": True}) as stream:
                events = [line.removeprefix("data: ") async for line in stream.aiter_lines() if line]
            assert json.loads(events[-2])["error"]["code"] == "request_failed"
            assert events[-1] == "[DONE]"
            assert (await client.post("/v1/completions", json={**body, "n": 2})).status_code == 200
            await idle(engine)

    run(test)


class _HeldMasks:
    """Masks after the first wait until they may `may_continue`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_continue = threading.Event()
        compute = Matcher._compute

        def held(matcher: Matcher, *token: int) -> torch.Tensor:
            if token:
                self.may_continue.wait(60)
            return compute(matcher, *token)

        monkeypatch.setattr(Matcher, "_compute", held)


WORDS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, guided_decoding=GuidedDecoding("regex", "[ab]{8}"))


@pytest.mark.parametrize("ending", ["continues", "is aborted", "fails"])
def test_a_mask_that_takes_long_holds_up_nobody_else(
    shared: LocalEngine, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engine = shared
        right = await _neighbours(engine)
        alone = tokens_of(await ask(engine, GenerationRequest("a", PROMPTS[1], WORDS)))
        masks = _HeldMasks(monkeypatch)
        stream = engine.generate(GenerationRequest("a", PROMPTS[1], WORDS))
        first = await anext(stream)
        assert await _neighbours(engine) == right  # all of their tokens, while it has one
        if ending == "fails":
            monkeypatch.setattr(
                Matcher, "restrict", _Injected(Matcher.restrict, lambda *_: True, Panic("x"), 2).method()
            )
        if ending == "is aborted":
            await stream.aclose()
        masks.may_continue.set()
        if ending == "continues":
            assert [*first.tokens, *tokens_of([chunk async for chunk in stream])] == alone
        elif ending == "fails":
            with pytest.raises(RequestFailed):
                await anext(stream)
        assert await _neighbours(engine, "after") == right
        await idle(engine)

    run(test)


def test_an_engine_that_closes_while_a_mask_is_computed_says_so(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            masks = _HeldMasks(monkeypatch)
            stream = engine.generate(GenerationRequest("a", PROMPTS[1], WORDS))
            await anext(stream)
            await engine.close()
            masks.may_continue.set()
            with pytest.raises(EngineStopped):
                await anext(stream)

    run(test)


def test_a_sequence_preempted_while_its_mask_is_computed_continues_as_if_it_were_not(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        # 12 blocks of 4 tokens: two of these answers are too large to run side by side to their ends.
        config = LocalEngineConfig(kv_cache_bytes=12 * 4 * 512, block_size=4)
        async with running(load_tiny(tiny_base), config) as engine:
            long = replace(GREEDY, max_tokens=40)
            alone = tokens_of(await ask(engine, GenerationRequest("a", PROMPTS[1], WORDS)))
            beside = tokens_of(await ask(engine, GenerationRequest("b", PROMPTS[0], long)))
            masks = _HeldMasks(monkeypatch)
            other = engine.generate(GenerationRequest("b", PROMPTS[0], long))
            seen = list((await anext(other)).tokens)
            stream = engine.generate(GenerationRequest("a", PROMPTS[1], WORDS))
            first = await anext(stream)
            async for chunk in other:
                seen += chunk.tokens
            assert engine.status().num_preemptions > 0
            masks.may_continue.set()
            assert [*first.tokens, *tokens_of([chunk async for chunk in stream])] == alone
            assert seen == beside
            await idle(engine)

    run(test)


def test_whatever_one_of_several_choices_raises_reaches_the_caller(
    shared: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(engine: LocalEngine, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        if request.id == "b":
            raise Panic("broken")
        await asyncio.Event().wait()
        yield  # type: ignore[misc]

    async def test() -> None:
        monkeypatch.setattr(LocalEngine, "generate", broken)
        requests = tuple(GenerationRequest(name, PROMPTS[0], GREEDY) for name in "ab")
        with pytest.raises(Panic):
            await anext(_merged(shared, requests))

    run(test)
