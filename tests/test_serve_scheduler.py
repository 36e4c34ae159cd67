"""Policy without tensors: thousands of random schedules, and the rules one by one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.scheduler import Batch, BlockPool, Scheduler, SchedulerLimits, Sequence


def _sequence(name: str, *, prompt: int = 4, adapter: str | None = None, max_tokens: int = 8) -> Sequence:
    adapters = (AdapterScale(adapter),) if adapter else ()
    return Sequence.of(GenerationRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=max_tokens), adapters))


def _scheduler(num_blocks: int = 64, block_size: int = 4, **limits: int) -> Scheduler:
    return Scheduler(SchedulerLimits(**limits), BlockPool(num_blocks, block_size))


def _step(scheduler: Scheduler) -> Batch | None:
    batch = scheduler.schedule()
    if batch:
        scheduler.commit(batch, {piece.sequence.request.id: 7 for piece in batch.pieces if piece.samples})
    scheduler.check()
    return batch


def test_nothing_to_do_gives_no_batch() -> None:
    assert _scheduler().schedule() is None


def test_a_prompt_is_computed_once_and_then_one_token_a_step() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence("a", prompt=6))
    assert [(p.start, p.num_tokens, p.samples) for p in _step(scheduler).pieces] == [(0, 6, True)]  # type: ignore[union-attr]
    assert [(p.start, p.num_tokens, p.samples) for p in _step(scheduler).pieces] == [(6, 1, True)]  # type: ignore[union-attr]


def test_a_long_prompt_is_cut_and_decoding_goes_on_beside_it() -> None:
    scheduler = _scheduler(max_prefill_chunk=8)
    scheduler.add(_sequence("short"))
    _step(scheduler)
    scheduler.add(_sequence("long", prompt=20))
    shapes = []
    for _ in range(3):
        batch = _step(scheduler)
        assert batch is not None
        shapes.append({p.sequence.request.id: (p.num_tokens, p.samples) for p in batch.pieces})
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
    order = [p.sequence.request.adapters[0].digest if p.sequence.request.adapters else None for p in batch.pieces]
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
    assert [(p.sequence, p.start, p.num_tokens) for p in batch.pieces] == [(new, 0, 9)]


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
        assert len({piece.sequence.request.id for piece in batch.pieces}) == len(batch.pieces)
        for piece in batch.pieces:
            sequence = piece.sequence
            if len(sequence.answer) >= sequence.request.sampling.max_tokens:
                scheduler.remove(sequence)
                finished.add(sequence.request.id)
    assert finished == expected
    assert scheduler.pool.num_free == num_blocks
