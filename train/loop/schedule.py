"""Choose the samples and the learning rate of each step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from train.recipe import TrainSection

_STEPS_SORTED = 50
"""Number of steps whose shuffled samples are sorted by length together: the order stays mostly random."""


def step_batches(lengths: Sequence[int], *, train: TrainSection, seed: int) -> Iterator[list[list[int]]]:
    """Yield the sample indices of each forward pass, step by step. Every epoch has its own seeded order.

    `lengths` are in tokens; with `group_by_length` samples of similar length share a step. The last step of an epoch
    takes the samples that are left. A recipe that counts steps repeats epochs until it has enough.
    """
    per_step = train.batch_size * train.gradient_accumulation
    remaining = train.num_steps(len(lengths))
    epoch = 0
    while remaining:
        for step in _epoch(lengths, per_step, seed=f"{seed}:{epoch}", is_grouped=train.group_by_length)[:remaining]:
            yield [step[place : place + train.batch_size] for place in range(0, len(step), train.batch_size)]
            remaining -= 1
        epoch += 1


def _epoch(lengths: Sequence[int], per_step: int, *, seed: str, is_grouped: bool) -> list[list[int]]:
    """Return the samples of each step of one epoch, each sample once."""
    draw = random.Random(seed)  # noqa: S311 - an order, not a secret
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if not is_grouped:
        return _chunks(order, per_step)
    window = per_step * _STEPS_SORTED
    ordered = [place for some in _chunks(order, window) for place in sorted(some, key=lambda place: -lengths[place])]
    steps = _chunks(ordered, per_step)
    # Within a window steps would run from long to short samples, and the loss with them; a short step stays last.
    whole = steps[: len(ordered) // per_step]
    draw.shuffle(whole)
    return [*whole, *steps[len(whole) :]]


def _chunks(places: Sequence[int], size: int) -> list[list[int]]:
    return [list(places[start : start + size]) for start in range(0, len(places), size)]


def learning_rate_at(step: int, *, of: int, train: TrainSection) -> float:
    """Return the learning rate of step 1 to `of`: linear warm-up, then constant or decaying to zero after `of`."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / (train.warmup_steps + 1)
    done = (step - train.warmup_steps - 1) / max(1, of - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
    return train.learning_rate * factor
