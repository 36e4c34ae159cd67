"""Sequences that are computed one at a time: as `generate` does, within the memory, whatever ends or is preempted."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from engine_runs import ask, idle, run, running, tokens_of, unverified
from served_right import _generate, _peft_model, loaded

from adapterhub.errors import RequestFailed, RequestTooLong, UsageError
from serve.adapters.weights import LowRank
from serve.config import LocalEngineConfig, SchedulerLimits
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine import single_runner
from serve.local_engine.computation import Room
from serve.local_engine.cpu.kernels import load_kernels
from serve.local_engine.lora_layers import AdapterBank
from serve.local_engine.single_runner import SingleRunner, measure_cache

PROMPTS = tuple(tuple(range(3 + n, 10 + 7 * n)) for n in range(4))
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
CONFIG = LocalEngineConfig(kv_cache_bytes=4 << 20, max_model_len=64, limits=SchedulerLimits(max_prefill_chunk=8))


def _requests(**changes: Any) -> list[GenerationRequest]:
    return [GenerationRequest(str(n), prompt, replace(GREEDY, **changes)) for n, prompt in enumerate(PROMPTS)]


def _right(model: Any, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1
    )
    return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", ["lfm2", "bloom"])
def test_a_preempted_sequence_is_computed_again(model_type: str) -> None:
    model = tiny_model(model_type)
    right = [_right(model, prompt, 12) for prompt in PROMPTS]
    size = measure_cache(model)
    # Memory for the states of four sequences, but for the tokens of two of them.
    memory = 4 * size.per_sequence + 64 * size.per_token
    config = replace(CONFIG, block_size=4, limits=SchedulerLimits(max_num_seqs=4), kv_cache_bytes=memory)

    async def test() -> None:
        async with running(loaded(model), config) as engine:
            assert engine.mode == "single"
            answers = await asyncio.gather(*(ask(engine, request) for request in _requests()))
            assert [tokens_of(answer) for answer in answers] == right
            assert engine.status().num_preemptions > 0
            await idle(engine)

    run(test)


def test_what_an_ended_sequence_kept_is_freed() -> None:
    async def test() -> None:
        async with running(loaded(tiny_model("lfm2")), CONFIG) as engine:
            runner = engine._runner
            assert isinstance(runner, SingleRunner)
            stream = engine.generate(_requests()[0])
            await anext(stream)
            await stream.aclose()
            await asyncio.gather(*(ask(engine, request) for request in _requests(max_tokens=2)))
            await ask(engine, replace(_requests(max_tokens=2)[0], id="last"))
            await idle(engine)
            assert len(runner._states) <= 1

    run(test)


def test_a_prompt_is_computed_whole_and_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = single_runner.forward

    def seen(model: Any, tokens: list[int], arguments: Any) -> Any:
        lengths.append(len(tokens) if arguments is None else 1)
        return forward(model, tokens, arguments)

    async def test() -> None:
        async with running(loaded(tiny_model("lfm2")), CONFIG) as engine:
            monkeypatch.setattr(single_runner, "forward", seen)
            for name in "ab":
                (first, *_) = await ask(engine, GenerationRequest(name, PROMPTS[3], replace(GREEDY, max_tokens=3)))
                assert first.num_cached_tokens == 0
            assert lengths == [len(PROMPTS[3]), 1, 1] * 2

    run(test)


def test_each_sequence_has_its_own_adapters(tmp_path: Path) -> None:
    model = tiny_model("lfm2")
    adapted = _peft_model(model, tmp_path / "adapter", None)
    right = [_generate(one, prompt)[0] for prompt in PROMPTS for one in (model, adapted)]

    async def test() -> None:
        async with running(loaded(model), CONFIG) as engine:
            adapter = unverified(tmp_path / "adapter", 0)
            await engine.load(adapter)
            mixes = ((), (AdapterScale(adapter.digest),))
            requests = [
                GenerationRequest(f"{n} {len(mix)}", prompt, replace(GREEDY, max_tokens=6), mix)
                for n, prompt in enumerate(PROMPTS)
                for mix in mixes
            ]
            answers = await asyncio.gather(*(ask(engine, request) for request in requests))
            assert [tokens_of(answer) for answer in answers] == right
            zero = replace(requests[1], id="zero", adapters=(AdapterScale(adapter.digest, 0.0),))
            assert tokens_of(await ask(engine, zero)) == right[0]
            await engine.unload(adapter.digest)
            assert tokens_of(await ask(engine, requests[0])) == right[0]
            await idle(engine)

    run(test)


def test_a_forward_that_fails_half_way_is_repeated_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("lfm2")
    right = [_right(model, prompt, 12) for prompt in PROMPTS]
    forward, calls = single_runner.forward, []

    def failing(model: Any, tokens: list[int], arguments: Any) -> Any:
        calls.append(tokens)
        found = forward(model, tokens, arguments)  # the cache has the token already
        if len(calls) in (9, 14) or (tokens[: len(PROMPTS[1])] == list(PROMPTS[1]) and len(calls) > 20):
            raise MemoryError("too little")
        return found

    async def test() -> None:
        async with running(loaded(model), CONFIG) as engine:
            monkeypatch.setattr(single_runner, "forward", failing)
            answers = await asyncio.gather(*(ask(engine, one) for one in _requests()), return_exceptions=True)
            assert isinstance(answers[1], RequestFailed)
            for number in (0, 2, 3):
                assert tokens_of(answers[number]) == right[number]  # type: ignore[arg-type]
            await idle(engine)

    run(test)


def test_memory_and_length_are_bounded() -> None:
    size = measure_cache(tiny_model("lfm2"))
    assert size.per_sequence > 0
    tokens = measure_cache(tiny_model("bloom"))
    assert (tokens.per_token, tokens.per_sequence) == (2 * 2 * 64 * 4, 0)  # keys and values of two layers
    states = measure_cache(tiny_model("falcon_mamba"))
    assert states.per_token <= 8  # positions alone
    assert states.per_sequence > 0
    with pytest.raises(UsageError, match="holds no token of this model"):
        asyncio.run(_started("bloom", kv_cache_bytes=100))

    async def test() -> None:
        async with running(loaded(tiny_model("falcon_mamba")), replace(CONFIG, max_model_len=None)) as engine:
            long = GenerationRequest("long", tuple(range(3, 20)), replace(GREEDY, max_tokens=1 << 40))
            with pytest.raises(RequestTooLong):
                await ask(engine, long)
        few = replace(CONFIG, kv_cache_bytes=4 * states.per_sequence)
        async with running(loaded(tiny_model("falcon_mamba")), few) as engine:
            assert engine._scheduler.limits.max_num_seqs == 2
            answers = await asyncio.gather(*(ask(engine, request) for request in _requests(max_tokens=3)))
            assert [len(tokens_of(answer)) for answer in answers] == [3] * 4

    run(test)


def test_counting_the_tokens_of_states_takes_no_more_memory_than_the_cache() -> None:
    """A state has one size for any number of tokens, and nothing else bounds the length of these models."""
    base, config = loaded(tiny_model("falcon_mamba")), LocalEngineConfig(kv_cache_bytes=8 << 20)
    room = Room.of(base, config, measure_cache(base.model), is_batched=False)
    tracemalloc.start()
    pool = room.pool()
    assert tracemalloc.get_traced_memory()[0] < config.kv_cache_bytes
    tracemalloc.stop()
    assert pool.num_blocks > 0


@pytest.mark.parametrize("has_kernels", [True, False])
def test_an_expert_that_gets_no_row_takes_the_adapter_from_no_other_layer(has_kernels: bool) -> None:
    bank = AdapterBank(tiny_model("bloom"), load_kernels()[0] if has_kernels else None)
    name, (group, place) = next(iter(bank.places.items()))
    rows = torch.randn(3, group.layers[place].in_features)
    before = group.output(place, rows)
    update = LowRank(torch.randn(2, rows.shape[1]), torch.randn(group.widths[place], 2).T, 1.0)
    bank.install("sha256:it", bank.prepare("it", {name: update}))
    bank.begin_one((AdapterScale("sha256:it"),))
    assert group.output(place, rows[:0]).shape == (0, group.widths[place])
    torch.testing.assert_close(group.output(place, rows.clone()), before + rows @ update.a.T @ update.bt)


async def _started(model_type: str, **changes: Any) -> None:
    async with running(loaded(tiny_model(model_type)), replace(CONFIG, **changes)):
        pass
