"""Policy without tensors: thousands of random schedules, and the rules one by one."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.config import SchedulerLimits
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine.scheduler import Batch, BlockPool, Scheduler, Sequence


def _sequence(
    name: str, *, prompt: int = 4, adapter: str | None = None, max_tokens: int = 8, first: int | None = None
) -> Sequence:
    """Prompts share nothing unless they are given the same `first` token."""
    adapters = (AdapterScale(adapter),) if adapter else ()
    at = crc32(name.encode()) if first is None else first
    tokens = tuple(range(at, at + prompt))
    return Sequence.of(GenerationRequest(name, tokens, SamplingParams(max_tokens=max_tokens), adapters))


def _scheduler(num_blocks: int = 64, block_size: int = 4, **limits: int) -> Scheduler:
    return Scheduler(SchedulerLimits(**limits), BlockPool(num_blocks, block_size))


def _step(scheduler: Scheduler) -> Batch | None:
    batch = scheduler.schedule()
    if batch:
        scheduler.commit(batch, {chunk.sequence.request.id: 7 for chunk in batch.chunks if chunk.samples})
    scheduler.check()
    return batch


def test_nothing_to_do_gives_no_batch() -> None:
    assert _scheduler().schedule() is None


def test_a_prompt_is_computed_once_and_then_one_token_a_step() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence("a", prompt=6))
    assert [(p.start, p.num_tokens, p.samples) for p in _step(scheduler).chunks] == [(0, 6, True)]  # type: ignore[union-attr]
    assert [(p.start, p.num_tokens, p.samples) for p in _step(scheduler).chunks] == [(6, 1, True)]  # type: ignore[union-attr]


def test_a_long_prompt_is_cut_and_decoding_continues_beside_it() -> None:
    scheduler = _scheduler(max_prefill_chunk=8)
    scheduler.add(_sequence("short"))
    _step(scheduler)
    scheduler.add(_sequence("long", prompt=20))
    shapes = []
    for _ in range(3):
        batch = _step(scheduler)
        assert batch is not None
        shapes.append({p.sequence.request.id: (p.num_tokens, p.samples) for p in batch.chunks})
    assert shapes == [
        {"short": (1, True), "long": (8, False)},
        {"short": (1, True), "long": (8, False)},
        {"short": (1, True), "long": (4, True)},
    ]


def test_rows_of_one_adapter_lie_side_by_side_and_the_base_last() -> None:
    scheduler = _scheduler()
    for number, adapter in enumerate(["b", None, "a", "b", None, "a"]):
        scheduler.add(_sequence(str(number), adapter=adapter))
    batch = scheduler.schedule()
    assert batch is not None
    order = [p.sequence.request.adapters[0].digest if p.sequence.request.adapters else None for p in batch.chunks]
    assert order == ["a", "a", "b", "b", None, None]


def test_no_more_run_together_than_allowed_and_the_rest_waits_in_order() -> None:
    scheduler = _scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(_sequence(name))
    _step(scheduler)
    assert [s.request.id for s in scheduler.running] == ["a", "b"]
    scheduler.remove(scheduler.running[0])
    _step(scheduler)
    assert [s.request.id for s in scheduler.running] == ["b", "c"]


def test_the_newest_gives_way_when_blocks_run_out_and_is_computed_again() -> None:
    scheduler = _scheduler(num_blocks=4, block_size=4)
    old, new = _sequence("old", prompt=7), _sequence("new", prompt=7)
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(3):  # two blocks each hold eight tokens; the ninth needs a third block
        _step(scheduler)
    assert scheduler.num_preemptions == 1
    assert new in scheduler.waiting
    assert new.num_computed == 0
    assert len(new.tokens) == 9  # what it had generated is kept
    scheduler.remove(old)
    batch = _step(scheduler)
    assert batch is not None
    # its first block was not needed by anybody else meanwhile
    assert [(p.sequence, p.start, p.num_tokens) for p in batch.chunks] == [(new, 4, 5)]


def test_a_removed_sequence_frees_its_blocks_at_once() -> None:
    scheduler = _scheduler()
    sequence = _sequence("a")
    scheduler.add(sequence)
    _step(scheduler)
    scheduler.remove(sequence)
    scheduler.remove(sequence)  # once more changes nothing
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_the_books_catch_a_lost_block() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence("a"))
    _step(scheduler)
    scheduler.running[0].blocks.pop()
    with pytest.raises(AssertionError, match="lost"):
        scheduler.check()


def _tokens_of(scheduler: Scheduler, steps: int) -> dict[str, int]:
    """Tokens sampled per request in so many steps."""
    found: Counter[str] = Counter()
    for _ in range(steps):
        batch = _step(scheduler)
        assert batch is not None
        found.update(chunk.sequence.request.id for chunk in batch.chunks if chunk.samples)
    return found


def test_a_thousand_requests_of_one_adapter_delay_anothers_first_token_no_longer_than_the_bound() -> None:
    scheduler = _scheduler(num_blocks=4096, max_num_seqs=8, max_wait_steps=10, max_prefill_chunk=16)
    for number in range(1000):
        scheduler.add(_sequence(f"greedy{number}", prompt=40, adapter="a", max_tokens=500))
    _tokens_of(scheduler, 100)
    scheduler.add(_sequence("late", prompt=40, adapter="b"))
    # ten steps until a place is made, three chunks of its prompt: nobody else's prompt comes before it
    assert _tokens_of(scheduler, 12)["late"] == 1


def test_one_who_waits_long_is_not_overtaken_when_memory_is_short() -> None:
    scheduler = _scheduler(num_blocks=10, max_num_seqs=8, max_wait_steps=5)
    scheduler.add(_sequence("long", prompt=30, adapter="b"))
    _step(scheduler)
    scheduler.add(_sequence("longer", prompt=36, adapter="c"))
    for number in range(50):
        scheduler.add(_sequence(f"short{number}", prompt=3, adapter="a"))
    assert _tokens_of(scheduler, 12)["longer"] >= 1


def test_groups_share_by_their_weights() -> None:
    scheduler = _scheduler(num_blocks=4096, max_num_seqs=1, max_wait_steps=10_000)
    for number in range(400):
        for adapter, weight in (("a", 1.0), ("b", 3.0)):
            sequence = _sequence(f"{adapter}{number}", adapter=adapter)
            scheduler.add(Sequence.of(replace(sequence.request, weight=weight)))
    served: Counter[str] = Counter()
    for _ in range(200):
        batch = _step(scheduler)
        assert batch is not None
        served[batch.chunks[0].sequence.request.id[0]] += 1
        scheduler.remove(batch.chunks[0].sequence)
    assert served == {"a": 50, "b": 150}


def test_an_idle_group_banks_no_credit() -> None:
    scheduler = _scheduler(num_blocks=4096, max_num_seqs=1, max_wait_steps=10_000)
    for number in range(200):
        scheduler.add(_sequence(f"a{number}", adapter="a"))
    for _ in range(100):
        scheduler.remove(_step(scheduler).chunks[0].sequence)  # type: ignore[union-attr]
    for number in range(100):
        scheduler.add(_sequence(f"b{number}", adapter="b"))
    turns: Counter[str] = Counter()
    for _ in range(20):
        batch = _step(scheduler)
        assert batch is not None
        turns[batch.chunks[0].sequence.request.id[0]] += 1
        scheduler.remove(batch.chunks[0].sequence)
    assert turns == {"a": 10, "b": 10}


def test_more_groups_than_places_take_turns() -> None:
    scheduler = _scheduler(num_blocks=4096, max_num_seqs=2, max_wait_steps=4)
    for number in range(6):
        scheduler.add(_sequence(str(number), adapter=f"adapter{number}", max_tokens=10_000))
    assert min(_tokens_of(scheduler, 200)[str(number)] for number in range(6)) > 20


def test_a_known_prefix_is_not_computed_again_and_the_last_token_always_is() -> None:
    scheduler = _scheduler(block_size=4)
    first, again = (_sequence(name, prompt=12, adapter="a", first=0) for name in ("first", "again"))
    scheduler.add(first)
    _step(scheduler)
    scheduler.add(again)
    batch = _step(scheduler)
    assert batch is not None
    assert [(p.start, p.num_tokens) for p in batch.chunks if p.sequence is again] == [(8, 4)]
    assert again.num_cached_tokens == 8
    assert again.blocks[:2] == first.blocks[:2]
    assert again.blocks[2] != first.blocks[2]


@pytest.mark.parametrize("other", [AdapterScale("b"), AdapterScale("a", 0.5), None])
def test_a_prefix_of_other_adapters_or_scales_is_not_shared(other: AdapterScale | None) -> None:
    scheduler = _scheduler(block_size=4)
    scheduler.add(_sequence("first", prompt=12, adapter="a", first=0))
    _step(scheduler)
    mine = Sequence.of(GenerationRequest("mine", tuple(range(12)), adapters=(other,) if other else ()))
    scheduler.add(mine)
    _step(scheduler)
    assert mine.num_cached_tokens == 0


def test_a_prefix_outlives_its_request_until_the_room_is_needed() -> None:
    scheduler = _scheduler(num_blocks=8, block_size=4)
    first = _sequence("first", prompt=12, first=0)
    scheduler.add(first)
    _step(scheduler)
    scheduler.remove(first)
    assert scheduler.pool.num_free == 8
    again = _sequence("again", prompt=12, first=0)
    scheduler.add(again)
    _step(scheduler)
    assert again.num_cached_tokens == 8
    scheduler.remove(again)
    large = Sequence.of(GenerationRequest("large", tuple(range(100, 130))))
    scheduler.add(large)
    _step(scheduler)
    scheduler.remove(large)
    last = _sequence("last", prompt=12, first=0)
    scheduler.add(last)
    _step(scheduler)
    assert last.num_cached_tokens == 0


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_schedules_lose_nobody_and_balance_the_books(seed: int) -> None:
    dice = random.Random(seed)
    block_size, num_blocks = dice.randint(1, 5), dice.randint(8, 30)
    capacity = block_size * num_blocks
    scheduler = _scheduler(
        num_blocks,
        block_size,
        max_num_seqs=dice.randint(1, 8),
        max_batch_tokens=dice.randint(9, 40),
        max_prefill_chunk=dice.randint(1, 16),
        max_wait_steps=dice.randint(1, 30),
    )
    coming = []
    for number in range(dice.randint(1, 20)):
        prompt = dice.randint(1, capacity // 2)
        answer = dice.randint(1, capacity - prompt - 1)
        adapter = dice.choice([None, "a", "b"])
        coming.append(_sequence(str(number), prompt=prompt, adapter=adapter, max_tokens=answer))
    finished: set[str] = set()
    expected = {sequence.request.id for sequence in coming}
    for _ in range(50_000):
        while coming and dice.random() < 0.5:
            scheduler.add(coming.pop())
        if scheduler.running and dice.random() < 0.01:
            gone = dice.choice(scheduler.running)
            scheduler.remove(gone)
            finished.add(gone.request.id)
        batch = _step(scheduler)
        if batch is None and not coming:
            break
        if batch is None:
            continue
        assert batch.num_tokens <= scheduler.limits.max_batch_tokens
        assert len({chunk.sequence.request.id for chunk in batch.chunks}) == len(batch.chunks)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if len(sequence.answer) >= sequence.request.sampling.max_tokens:
                scheduler.remove(sequence)
                finished.add(sequence.request.id)
    assert finished == expected
    assert scheduler.pool.num_free == num_blocks


def test_more_places_than_tokens_of_a_step_hold_nobody_up() -> None:
    scheduler = _scheduler(num_blocks=4096, max_num_seqs=64, max_batch_tokens=8, max_wait_steps=10)
    for number in range(64):
        scheduler.add(_sequence(f"greedy{number}", adapter="a", max_tokens=10_000))
    _tokens_of(scheduler, 50)
    scheduler.add(_sequence("late", adapter="b"))
    assert _tokens_of(scheduler, 14)["late"] >= 1


def test_a_starved_prompt_is_computed_though_others_were_served_less() -> None:
    scheduler = _scheduler(num_blocks=4096, max_num_seqs=4, max_prefill_chunk=16, max_wait_steps=10)
    scheduler.add(_sequence("first", prompt=16, adapter="b"))
    for number in range(60):
        scheduler.add(_sequence(f"flood{number}", prompt=400, adapter="a"))
    _tokens_of(scheduler, 1)
    scheduler._share._served["b"] += 1e9  # as after a much longer answer
    scheduler.remove(next(s for s in scheduler.running if s.request.id == "first"))
    scheduler.add(_sequence("second", prompt=16, adapter="b"))
    assert _tokens_of(scheduler, 10)["second"] == 1


@pytest.mark.parametrize("num_tokens", [3000, 5000, 5600])
@pytest.mark.parametrize("trickle", [False, True], ids=["alone", "with short ones"])
def test_long_prompts_too_large_for_the_cache_together_are_answered(num_tokens: int, trickle: bool) -> None:
    scheduler = _scheduler(num_blocks=360, block_size=16)  # 5760 tokens
    for adapter in "ab":
        scheduler.add(_sequence(adapter, prompt=num_tokens, adapter=adapter, max_tokens=100))
    finished: list[str] = []
    for step in range(1000):
        if trickle and step % 20 == 0:
            scheduler.add(_sequence(f"short{step}", prompt=30, adapter=f"adapter{step}", max_tokens=20))
        batch = scheduler.schedule()
        if batch is None or {"a", "b"} <= set(finished):
            break
        scheduler.commit(batch, {chunk.sequence.request.id: 7 for chunk in batch.chunks if chunk.samples})
        for chunk in batch.chunks:
            if len(chunk.sequence.answer) == chunk.sequence.request.sampling.max_tokens:
                scheduler.remove(chunk.sequence)
                finished.append(chunk.sequence.request.id)
    assert {"a", "b"} <= set(finished)
    assert step < 500  # 2 x (22 steps of prompt + 100 of answer) without any preemption
    assert not trickle or len(finished) > step // 20 - 3  # each within 40 steps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_first_prompt_tokens_come_within_the_bound_whatever_is_short(seed: int) -> None:
    """Places, tokens of a step and KV blocks are too few; counters lie far apart; requests come and go as they like."""
    dice = random.Random(seed)
    block_size, num_blocks = dice.randint(1, 5), dice.randint(8, 30)
    capacity = block_size * num_blocks
    scheduler = _scheduler(
        num_blocks,
        block_size,
        max_num_seqs=dice.randint(1, 8),
        max_batch_tokens=dice.randint(1, 20),
        max_prefill_chunk=dice.randint(1, 16),
        max_wait_steps=dice.randint(1, 20),
    )
    names = itertools.count()
    latest: dict[str, int] = {}
    """group that had no request before one came -> the step by which a token of it is to be computed"""

    def groups() -> set[str]:
        return {sequence.group for sequence in [*scheduler.running, *scheduler.waiting]}

    for step in range(1, 120):
        while dice.random() < 0.3:
            adapter = dice.choice("abcdefgh")
            prompt = dice.randint(1, capacity // 2)
            answer = dice.randint(1, capacity - prompt - 1)
            others = groups() - {adapter}
            if adapter not in groups():
                latest[adapter] = step - 1 + scheduler.limits.max_wait_steps + len(others)
            share = scheduler._share
            scheduler.add(_sequence(str(next(names)), prompt=prompt, adapter=adapter, max_tokens=answer))
            if dice.random() < 0.1:
                share._served[adapter] = share.served(adapter) + dice.choice([1e3, 1e6])
        batch = _step(scheduler)
        for chunk in batch.chunks if batch else ():
            latest.pop(chunk.sequence.group, None)
            if len(chunk.sequence.answer) >= chunk.sequence.request.sampling.max_tokens or dice.random() < 0.01:
                scheduler.remove(chunk.sequence)
        if scheduler.num_waiting and dice.random() < 0.05:
            scheduler.remove(dice.choice(scheduler.waiting))
        latest = {group: last for group, last in latest.items() if group in groups()}
        assert all(step < last for last in latest.values()), (step, latest)
