"""Logging of a run's metrics to experiment trackers, only to those that were named.

Each tracker reads its own configuration (`TRACKIO_DIR`, `WANDB_MODE`, ...); by default, trackio and TensorBoard write
to this machine's disk. When a tracker fails, its tracking ends and the run continues.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from adapterhub.errors import UsageError
from adapterhub.package.run_record import RunEnd, RunEvent, RunMeasured, RunStep
from train.loop.run_folder import Listener
from train.recipe import Recipe

PROJECT = "adapterhub"


class Tracker(Protocol):
    """One run in an experiment tracker."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class _RunTracker:
    """A run of trackio or Weights & Biases; trackio has the same interface."""

    def __init__(self, module: Any, options: dict[str, Any], recipe: Recipe) -> None:
        self._run = module.init(project=PROJECT, name=recipe.name, config=recipe.model_dump(mode="json"), **options)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log(figures, step=step)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / recipe.name))
        self._writer.add_text("recipe", f"```toml\n{recipe.to_toml()}```")

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def _trackio(module: Any, recipe: Recipe) -> Tracker:
    # Machine figures every ten seconds are not the run's, and asking for them starts threads.
    return _RunTracker(module, {"auto_log_gpu": False, "auto_log_cpu": False, "resume": "allow"}, recipe)


TRACKERS: dict[str, tuple[str, Callable[[Any, Recipe], Tracker]]] = {
    "trackio": ("trackio", _trackio),
    "wandb": ("wandb", lambda module, recipe: _RunTracker(module, {"resume": "allow"}, recipe)),
    "tensorboard": ("tensorboard", lambda module, recipe: _TensorBoard(recipe, Path("runs"))),
}
"""Name -> (the module it needs, the function that starts a run)."""


@contextmanager
def tracking(names: Sequence[str], recipe: Recipe) -> Iterator[Listener]:
    """Yield the function to call with each event of the run.

    Raises UsageError for a tracker that is unknown, not installed, or cannot start.
    """
    modules = [_module_of(name) for name in names]
    with ExitStack() as stack:
        trackers: dict[str, Tracker] = {}
        for name, module in zip(names, modules, strict=True):
            trackers[name] = _start(name, module, recipe)
            stack.callback(_call, trackers, name, lambda tracker: tracker.finish())

        def listen(event: RunEvent) -> None:
            if found := _figures(event):
                figures, step = found
                for name in list(trackers):
                    _call(trackers, name, lambda tracker: tracker.log(figures, step))

        yield listen


def _module_of(name: str) -> Any:
    if name not in TRACKERS:
        raise UsageError(
            f"unknown tracker {name}: expected one of {', '.join(TRACKERS)}. Correct --report-to, or leave it out."
        )
    module = TRACKERS[name][0]
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"the tracker {name} is not installed: pip install {module}") from error


def _start(name: str, module: Any, recipe: Recipe) -> Tracker:
    try:
        return TRACKERS[name][1](module, recipe)
    except Exception as error:  # trackers raise what they like
        raise UsageError(
            f"the tracker {name} cannot start ({type(error).__name__}: {error}): set it up, or leave out --report-to "
            f"{name}."
        ) from error


def _call(trackers: dict[str, Tracker], name: str, act: Callable[[Tracker], None]) -> None:
    if name not in trackers:
        return
    try:
        act(trackers[name])
    except Exception as error:  # trackers raise what they like, and hours of training are not theirs to end
        del trackers[name]
        print(
            f"note: the tracker {name} failed, its logging ends here ({type(error).__name__}: {error})",
            file=sys.stderr,
            flush=True,
        )


def _figures(event: RunEvent) -> tuple[dict[str, float], int] | None:
    """Return (name -> value, step), with the names that transformers' trackers use."""
    if isinstance(event, RunStep):
        named = {"train/loss": event.loss, "train/learning_rate": event.learning_rate}
        speed = {"train/grad_norm": event.grad_norm, "train/tokens_per_second": event.tokens / max(event.seconds, 1e-9)}
        return named | speed, event.step
    if isinstance(event, RunMeasured):
        return {"eval/loss": event.loss}, event.step
    if isinstance(event, RunEnd) and event.evaluations:
        last = event.evaluations[0]
        return {"eval/base_loss": last.base_loss, "eval/final_loss": last.adapter_loss}, event.steps
    return None
