"""The folder a run works in until its adapter is complete: record, checkpoints, and who is writing. No tensors.

OUTPUT.run/
  recipe.toml  chat_template.jinja     what the adapter will carry
  run.json                             where the recipe's relative paths start, the adapter it goes on from
  train_log.jsonl                      start, each step, held-out losses
  step-000040/                         the newest checkpoint: an adapter, optimizer state, state.json
  best-000030/                         the adapter with the lowest held-out loss
  lock                                 held by the process that trains
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from adapterhub.adapter import Adapter
from adapterhub.errors import OutputNotFresh, RunNotResumable
from adapterhub.files import new_folder, write_atomic
from adapterhub.package.run_record import (
    LOG_NAME,
    RECIPE_NAME,
    RunEnd,
    RunEvent,
    RunMeasured,
    RunSampled,
    RunStart,
    RunStep,
    read_run_events,
)
from train.recipe import Recipe, read_recipe

Listener = Callable[[RunEvent], None]
_RUN_NAME, _STATE_NAME, _LOCK_NAME = "run.json", "state.json", "lock"


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Run(_Closed):
    recipe_folder: str
    start: str | None
    """folder of the adapter the run goes on from"""


class State(_Closed):
    """Where a run stands at the end of a step; with weights and optimizer state, all that its rest depends on.

    Order, learning rate and dropout of a step follow from the recipe and the step's number.
    """

    step: int = 0
    best_loss: float | None = None
    """lowest held-out loss so far"""
    best_step: int = 0
    num_worse: int = 0
    """held-out losses since the lowest"""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: State


class RunFolder:
    """Made by `create` or `reopen`, which hold its lock until they are left."""

    def __init__(self, output: Path, recipe: Recipe, start: Path | None) -> None:
        self.output = output
        self.path = run_path(output)
        self.recipe = recipe
        self.start = start
        self.listen: Listener | None = None
        """called with each event that is logged"""

    @classmethod
    @contextmanager
    def create(cls, output: Path, recipe: Recipe, *, start: Adapter | None) -> Iterator[RunFolder]:
        """A new run into `output`, new or empty. It leaves nothing behind if it ends without a checkpoint.

        Raises OutputNotFresh when something is there, or a run that can be resumed.
        """
        check_fresh(output)
        path = run_path(output)
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path, output):
            if _newest(path) is not None:
                raise OutputNotFresh(
                    f"{path} holds a run that was stopped: go on with `adapterhub train --resume {output}`, or "
                    "remove that folder."
                )
            _sweep(output)
            run = cls(output, recipe, start.path if start else None)
            write_atomic(path / RECIPE_NAME, recipe.to_toml())
            written = _Run(
                recipe_folder=str(recipe.folder.absolute()), start=str(start.path.absolute()) if start else None
            )
            write_atomic(path / _RUN_NAME, written.model_dump_json(indent=1))
            (path / LOG_NAME).unlink(missing_ok=True)
            with run._dropped_if_empty():
                yield run

    @classmethod
    @contextmanager
    def reopen(cls, output: Path) -> Iterator[RunFolder]:
        """The run that was to become `output`. Raises RunNotResumable when there is none, or it goes on elsewhere."""
        path = run_path(output)
        recipe, start = read_run(output)
        with _locked(path, output):
            _sweep(output)
            run = cls(output, recipe, start)
            with run._dropped_if_empty():
                yield run

    @property
    def newest(self) -> Checkpoint | None:
        return _newest(self.path)

    def events(self) -> list[RunEvent]:
        """What the log says up to the newest checkpoint; steps after it will be taken again."""
        log = self.path / LOG_NAME
        if not log.is_file():
            return []
        last = self.newest.state.step if self.newest else -1
        kept = [event for event in read_run_events(log, is_whole=False) if _step_of(event) <= last]
        write_atomic(log, "".join(event.model_dump_json() + "\n" for event in kept))
        return kept

    def log(self, event: RunEvent) -> None:
        with (self.path / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(event.model_dump_json() + "\n")
        if self.listen is not None:
            self.listen(event)

    def save(self, state: State, write: Callable[[Path], None]) -> None:
        """A checkpoint of `state`, which replaces older ones when it is complete; `write` fills its folder."""
        target = self.path / f"step-{state.step:06d}"
        if target.exists():
            return
        with new_folder(target) as folder:
            write(folder)
            write_atomic(folder / _STATE_NAME, state.model_dump_json())
        for older in (*self.path.glob("step-*"), *self.path.glob("best-*")):
            if older not in (target, self.best_at(state.best_step)):
                shutil.rmtree(older)

    def save_best(self, step: int, write: Callable[[Path], None]) -> None:
        """The weights with the lowest held-out loss so far. The one before stays until a checkpoint names this one."""
        target = self.best_at(step)
        shutil.rmtree(target, ignore_errors=True)
        with new_folder(target) as folder:
            write(folder)

    def best_at(self, step: int) -> Path:
        return self.path / f"best-{step:06d}"

    def finished(self) -> RunEnd | None:
        """How the run ended, if the output is already written and only this folder was left to be removed."""
        log = self.output / LOG_NAME
        if not log.is_file():
            return None
        ours, theirs = read_run_events(self.path / LOG_NAME, is_whole=False), read_run_events(log)
        return theirs[-1] if ours == theirs and isinstance(theirs[-1], RunEnd) else None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def _dropped_if_empty(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.path.is_dir() and self.newest is None:
                self.remove()


def run_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.run")


def check_fresh(output: Path) -> None:
    """Raises OutputNotFresh unless `output` is new or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise OutputNotFresh(f"{output} already exists: name a new folder, or move this one away first.")


def read_run(output: Path) -> tuple[Recipe, Path | None]:
    """(recipe, folder of the adapter it goes on from) of a run that can be resumed. Raises RunNotResumable."""
    path = run_path(output)
    try:
        raw = _Run.model_validate_json((path / _RUN_NAME).read_text())
    except (OSError, ValidationError) as error:
        done = " (it is complete)" if (output / LOG_NAME).is_file() else ""
        raise RunNotResumable(
            f"there is no run to resume at {output}{done}: expected {path}, which a stopped `adapterhub train` leaves."
        ) from error
    recipe = read_recipe(path / RECIPE_NAME, folder=Path(raw.recipe_folder))
    return recipe, Path(raw.start) if raw.start else None


def _newest(path: Path) -> Checkpoint | None:
    """A folder with a step's name is complete: it got that name by a rename."""
    found = sorted(path.glob("step-*"))
    if not found:
        return None
    return Checkpoint(found[-1], State.model_validate_json((found[-1] / _STATE_NAME).read_text()))


def _step_of(event: RunEvent) -> int:
    if isinstance(event, RunStep | RunMeasured | RunSampled):
        return event.step
    return 0 if isinstance(event, RunStart) else 1 << 62


def _sweep(output: Path) -> None:
    """What a killed process left half-written; nobody else writes while we hold the lock."""
    for place in (output.parent.glob(f".{output.name}.*.tmp"), run_path(output).glob(".*.tmp")):
        for leftover in place:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def _locked(path: Path, output: Path) -> Iterator[None]:
    lock = FileLock(path / _LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputNotFresh(f"{output} is being trained by another process: wait for it, or name another.") from error
    try:
        yield
    finally:
        lock.release()
