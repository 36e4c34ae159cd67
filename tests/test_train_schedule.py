"""Order of samples and learning rates, in plain numbers."""

from __future__ import annotations

from typing import Any

import pytest

from train.recipe import TrainSection
from train.schedule import learning_rate_at, step_batches


def section(**values: Any) -> TrainSection:
    return TrainSection(**({"steps": 10, "learning_rate": 1.0} | values))


def rates(**values: Any) -> list[float]:
    train = section(**values)
    return [learning_rate_at(step, of=10, train=train) for step in range(1, 11)]


def test_an_epoch_takes_every_sample_once() -> None:
    train = section(steps=None, epochs=1, batch_size=3, gradient_accumulation=2)
    steps = list(step_batches(14, train=train, seed=0))
    assert [[len(batch) for batch in step] for step in steps] == [[3, 3], [3, 3], [2]]
    assert sorted(place for step in steps for batch in step for place in batch) == list(range(14))
    assert len(steps) == train.num_steps(14)


def test_each_epoch_and_seed_has_its_own_order() -> None:
    train = section(steps=None, epochs=2, batch_size=20)
    first, second = (step[0] for step in step_batches(20, train=train, seed=0))
    other = next(step_batches(20, train=train, seed=1))[0]
    assert first != second
    assert first != other
    assert [first] == next(step_batches(20, train=train, seed=0))


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_steps_cut_or_repeat_epochs(steps: int) -> None:
    assert len(list(step_batches(10, train=section(steps=steps, batch_size=2), seed=0))) == steps


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
