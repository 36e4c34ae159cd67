"""Training runs that are stopped and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from training import make_recipe, run

from adapterhub.adapter import StoredBase
from adapterhub.errors import TrainingStopped
from adapterhub.run_record import RunMeasured, RunStep, read_run_events
from train.progress import Silent
from train.recipe import Recipe
from train.trainer import resume


class StopAfter(Silent):
    """Somebody sends SIGTERM during a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self._step, self._number = step, number

    def step(self, done: RunStep, *, of: int) -> None:
        if done.step == self._step:
            os.kill(os.getpid(), self._number)


def recipe_of(folder: Path, **train: Any) -> Recipe:
    """Six steps with dropout, over more than one epoch."""
    return make_recipe(folder, train={"steps": 6, "checkpoint_every": 2} | train)


def stopped(recipe: Recipe, base: StoredBase, output: Path, *, after: int) -> None:
    with pytest.raises(TrainingStopped):
        run(recipe, base, output, progress=StopAfter(after))


def resumed(output: Path, base: StoredBase) -> None:
    resume(output, base, progress=Silent())


def losses(folder: Path) -> list[float]:
    return [e.loss for e in read_run_events(folder / "train_log.jsonl") if isinstance(e, RunMeasured)]
