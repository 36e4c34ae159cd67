"""Which samples a step takes, and at which learning rate. Plain numbers, no tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from train.recipe import TrainSection


def step_batches(num_samples: int, *, train: TrainSection, seed: int) -> Iterator[list[list[int]]]:
    """For each step, the sample indices of its forward passes. Every epoch has its own seeded order.

    An epoch's last step takes what is left; when the recipe counts steps, epochs go on until it is reached.
    """
    per_step = train.batch_size * train.gradient_accumulation
    remaining = train.num_steps(num_samples)
    epoch = 0
    while remaining:
        order = list(range(num_samples))
        random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311 - an order, not a secret
        for start in range(0, num_samples, per_step)[:remaining]:
            taken = order[start : start + per_step]
            yield [taken[place : place + train.batch_size] for place in range(0, len(taken), train.batch_size)]
            remaining -= 1
        epoch += 1


def learning_rate_at(step: int, *, of: int, train: TrainSection) -> float:
    """The rate of step 1 ... `of`: a straight rise over the warm-up, then constant, or down to zero after the end."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / (train.warmup_steps + 1)
    done = (step - train.warmup_steps - 1) / max(1, of - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train.schedule]
    return train.learning_rate * factor
