"""Order of samples and learning rates, in plain numbers."""

from __future__ import annotations

from typing import Any

import pytest

from train.loop.schedule import learning_rate_at, step_batches
from train.recipe import TrainSection


def section(**values: Any) -> TrainSection:
    return TrainSection(**({"steps": 10, "learning_rate": 1.0} | values))


def rates(**values: Any) -> list[float]:
    train = section(**values)
    return [learning_rate_at(step, of=10, train=train) for step in range(1, 11)]


def flat(step: list[list[int]]) -> list[int]:
    return [place for batch in step for place in batch]


def test_an_epoch_takes_every_sample_once() -> None:
    train = section(steps=None, epochs=1, batch_size=3, gradient_accumulation=2)
    steps = list(step_batches([1] * 14, train=train, seed=0))
    assert [[len(batch) for batch in step] for step in steps] == [[3, 3], [3, 3], [2]]
    assert sorted(place for step in steps for batch in step for place in batch) == list(range(14))
    assert len(steps) == train.num_steps(14)


def test_each_epoch_and_seed_has_its_own_order() -> None:
    train = section(steps=None, epochs=2, batch_size=20)
    first, second = (step[0] for step in step_batches([1] * 20, train=train, seed=0))
    other = next(step_batches([1] * 20, train=train, seed=1))[0]
    assert first != second
    assert first != other
    assert [first] == next(step_batches([1] * 20, train=train, seed=0))


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_steps_cut_or_repeat_epochs(steps: int) -> None:
    assert len(list(step_batches([1] * 10, train=section(steps=steps, batch_size=2), seed=0))) == steps


def test_warm_up_rises_evenly_and_never_starts_at_zero() -> None:
    assert rates(schedule="constant", warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


def test_linear_falls_evenly() -> None:
    assert rates(schedule="linear", warmup_steps=0) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_cosine_is_half_way_in_the_middle() -> None:
    found = rates(schedule="cosine", warmup_steps=0)
    assert found[0] == 1.0
    assert found[5] == pytest.approx(0.5)
    assert found[9] == pytest.approx(0.0245, abs=1e-3)


def test_a_warm_up_longer_than_the_run() -> None:
    assert max(rates(warmup_steps=100)) < 0.1


def test_samples_of_similar_length_share_a_step() -> None:
    train = section(steps=None, epochs=1, batch_size=2, gradient_accumulation=2, group_by_length=True)
    lengths = [place * 7 % 41 for place in range(41)]
    steps = [flat(step) for step in step_batches(lengths, train=train, seed=0)]
    assert sorted(place for step in steps for place in step) == list(range(41))
    assert max(max(lengths[p] for p in step) - min(lengths[p] for p in step) for step in steps) == 3
    firsts = [lengths[step[0]] for step in steps[:-1]]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)
    assert steps == [
        [place for batch in step for place in batch] for step in step_batches(lengths, train=train, seed=0)
    ]


def test_grouping_by_length_is_an_order_of_its_own_in_each_epoch() -> None:
    train = section(steps=None, epochs=2, batch_size=4, group_by_length=True)
    steps = [step[0] for step in step_batches(list(range(40)), train=train, seed=0)]
    assert steps[:10] != steps[10:]
    assert sorted(map(sorted, steps[:10])) == sorted(map(sorted, steps[10:]))
