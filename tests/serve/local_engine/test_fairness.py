"""Shares between groups: who a request is charged to, and the counters of algorithm 2 of the VTC paper."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest

from serve.config import SchedulerLimits
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine.fairness import BASE, FairShare, group_of
from serve.local_engine.scheduler import BlockPool, Scheduler, Sequence

Mix = tuple[tuple[str, float], ...]


def _request(*mix: tuple[str, float], name: str = "r", prompt: int = 4, weight: float = 1.0) -> GenerationRequest:
    adapters = tuple(AdapterScale(digest, scale) for digest, scale in mix)
    return GenerationRequest(name, tuple(range(prompt)), SamplingParams(), adapters, weight)


@pytest.mark.parametrize(
    ("mix", "group"),
    [
        ((), BASE),
        ((("b", 1.0),), "b"),
        ((("b", 0.3),), "b"),
        ((("b", -2.0),), "b"),
        ((("b", 0.0),), BASE),
        ((("b", -0.0), ("c", 0.0)), BASE),
        ((("b", 1.0), ("c", 0.0)), "b"),
        ((("c", 0.0), ("b", 1.0)), "b"),
        ((("b", 1.0), ("c", 1e-30)), "b"),
        ((("c", 5e-324), ("b", 1.0)), "b"),
        ((("b", 1.0), ("c", 0.5), ("d", 0.9)), "b"),
        ((("d", 0.9), ("c", 0.5), ("b", 1.0)), "b"),
        ((("b", 0.5), ("c", 0.8), ("b", 0.5)), "b"),
        ((("b", 1.0), ("b", -1.0)), BASE),
        ((("b", 1.0), ("c", 1.0)), "c"),
        ((("c", 1.0), ("b", 1.0)), "c"),
        ((("b", 1e308), ("b", 1e308), ("c", 1e308)), "b"),
    ],
)
def test_a_mix_is_charged_to_its_strongest_adapter_however_it_is_written(mix: Mix, group: str) -> None:
    assert group_of(_request(*mix)) == group


def _ways_to_ask(digests: str) -> list[Mix]:
    """Every order of every subset, at scales that change the answers, hardly change them, and do not."""
    found: list[Mix] = []
    for size in range(1, len(digests) + 1):
        for order in itertools.permutations(digests, size):
            for scales in ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (1.0, 1e-30, -1e-30), (0.5, 0.7, 0.9)):
                found.append(tuple(zip(order, scales[:size], strict=True)))
    found += [((digest, 0.5), (digest, 0.5)) for digest in digests]
    return found


def _share_of_a(ways: list[Mix]) -> float:
    """Tokens served to adapter a, of all: its requests wait beside others asked in each of these ways, in a circle."""
    limits = SchedulerLimits(max_num_seqs=2, max_prefill_chunk=64, max_wait_steps=64)
    scheduler = Scheduler(limits, BlockPool(4096, 16))
    names = itertools.count()

    def ask(*mix: tuple[str, float]) -> None:
        scheduler.add(Sequence.of(_request(*mix, name=f"{next(names)}", prompt=10)))

    for _ in range(3):
        ask(("a", 1.0))
    for way in ways:
        ask(*way)
    served: Counter[bool] = Counter()
    for _ in range(4000):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.commit(batch, {chunk.sequence.request.id: 7 for chunk in batch.chunks if chunk.samples})
        for chunk in batch.chunks:
            request = chunk.sequence.request
            served[request.adapters[0].digest == "a"] += chunk.num_tokens
            if len(chunk.sequence.answer) == 10:
                scheduler.remove(chunk.sequence)
                ask(*((adapter.digest, adapter.scale) for adapter in request.adapters))
    return served[True] / served.total()


@pytest.mark.parametrize(("digests", "share"), [("b", 1 / 2), ("bc", 1 / 3), ("bcd", 1 / 4)])
def test_who_asks_several_adapters_in_every_way_gets_one_share_for_each(digests: str, share: float) -> None:
    plain: list[Mix] = [((digest, 1.0),) for digest in digests]
    assert _share_of_a(plain * 3) == pytest.approx(share, abs=0.02)
    assert _share_of_a(_ways_to_ask(digests)) > share - 0.02


def _charged(share: FairShare, group: str, price: float) -> None:
    request = _request((group, 1.0)) if group else _request()
    share.charge(request, num_input=0, num_output=1)
    share._served[group] += price - 2.0


def test_who_comes_back_is_lifted_to_the_least_served_that_waits() -> None:
    share = FairShare()
    for group, price in (("a", 500.0), ("b", 900.0), ("c", 3.0)):
        share.arrive(group, waiting=(), running=())
        _charged(share, group, price)
    share.arrive("c", waiting=("a", "b"), running=())
    assert share.served("c") == share.served("a")


def test_who_comes_when_nobody_waits_is_lifted_to_the_counter_of_the_last_that_did() -> None:
    share = FairShare()
    share.arrive("a", waiting=(), running=())
    share.arrive("b", waiting=("a",), running=())
    _charged(share, "b", 10.0)
    share.leave("b")
    share.leave("a")
    _charged(share, "a", 1_000_000.0)  # it decodes after it left the queue
    share.arrive("new", waiting=(), running=("a",))
    assert share.served("new") == share.served("a") == 1_000_000.0


def test_who_was_served_more_than_the_level_keeps_its_counter() -> None:
    share = FairShare()
    share.arrive("a", waiting=(), running=())
    _charged(share, "a", 50.0)
    share.arrive("b", waiting=("a",), running=())
    share.leave("a")
    share.leave("b")
    _charged(share, "a", 50.0)
    share.arrive("a", waiting=(), running=("b",))
    assert share.served("a") - share.served("b") == 50.0


def test_idle_groups_are_forgotten() -> None:
    share = FairShare()
    for number in range(10_000):
        share.arrive(f"digest{number}", waiting=(), running=())
        share.leave(f"digest{number}")
        _charged(share, f"digest{number}", 100.0)
    assert len(share) <= 2


@pytest.mark.parametrize("weight", [1e-300, 5e-324, 1e-9, 1.0, 1e300])
def test_counters_tell_one_token_however_much_was_served(weight: float) -> None:
    share = FairShare()
    share.arrive("old", waiting=(), running=())
    for _ in range(3000):
        share.charge(_request(("old", 1.0), weight=weight), num_input=100_000, num_output=0)
    share.leave("old")
    for number in range(3):  # the one that lifts, then the ones that are moved down with it
        group = f"new{number}"
        share.arrive(group, waiting=(), running=())
        before = share.served(group)
        share.charge(_request((group, 1.0)), num_input=1, num_output=0)
        assert math.isfinite(before)
        assert share.served(group) == before + 1
        share.leave(group)


@pytest.mark.parametrize("history", [0, 10_000, 100_000, 1_000_000])
def test_a_name_with_a_history_gets_its_first_token_as_soon_as_one_without(history: int) -> None:
    limits = SchedulerLimits(max_num_seqs=8, max_batch_tokens=10_008, max_prefill_chunk=10_000)
    scheduler = Scheduler(limits, BlockPool(4096, 16))

    def step() -> set[str]:
        batch = scheduler.schedule()
        assert batch is not None
        sampled = {chunk.sequence.request.id: 7 for chunk in batch.chunks if chunk.samples}
        scheduler.commit(batch, sampled)
        return set(sampled)

    def ask(name: str, adapter: str, prompt: int) -> None:
        request = replace(_request((adapter, 1.0), name=name, prompt=prompt), prompt=(len(scheduler.waiting),) * prompt)
        scheduler.add(Sequence.of(request))

    for number in range(history // 10_000):
        ask(f"before{number}", "old", 10_000)
        step()
        scheduler.remove(scheduler.running[0])
    for number in range(100):  # a new name, in one idle moment
        ask(f"new{number}", "new", 40)
    step()
    ask("back", "old", 40)
    steps = 1
    while "back" not in step():
        scheduler.remove(scheduler.running[0])
        steps += 1
    assert steps == 2  # the first is the new name's, which has all places
