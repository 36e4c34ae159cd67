"""How many GPUs of a size a model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapterhub.memory.estimate import PROCESS_CUDA, Estimate
from adapterhub.memory.training import Sharding

COMMON_GB = (8, 16, 24, 48, 80, 141)
"""Memory of common GPUs, in GB."""
MOST = 64
"""Largest number of GPUs that is looked at."""


@dataclass(frozen=True)
class Fit:
    """A number of GPUs that a model takes."""

    gpus: int | None
    """None: more than `MOST`, or more than one where the work is not divided."""
    is_tight: bool = False
    """Whether the upper end of the estimate is more than a GPU has."""


@dataclass(frozen=True)
class GpuCount:
    """How many GPUs of one size training and serving take."""

    training: Fit
    serving: Fit


def count_gpus(
    gigabytes: int, trained_on: Callable[[int, Sharding], Estimate], serving: Estimate, *, is_divisible: bool
) -> GpuCount:
    """Return how many GPUs with so many GB (10^9 bytes) it takes.

    `trained_on` estimates training on a number of GPUs. A training that is not `is_divisible` takes one or none. A
    server on several GPUs divides all but the CUDA context, as vLLM's tensor parallelism does.
    """
    room = gigabytes * 10**9
    training = Fit(None)
    for gpus in range(1, (MOST if is_divisible else 1) + 1):
        estimate = trained_on(gpus, "none" if gpus == 1 else "layers")
        if estimate.size_bytes <= room:
            training = Fit(gpus, estimate.high > room)
            break
    shares = (
        Fit(gpus, is_tight=(serving.high - PROCESS_CUDA) // gpus + PROCESS_CUDA > room)
        for gpus in range(1, MOST + 1)
        if (serving.size_bytes - PROCESS_CUDA) // gpus + PROCESS_CUDA <= room
    )
    return GpuCount(training, next(shares, Fit(None)))
