"""The folder of a run that is not complete: run record, checkpoints and lock.

OUTPUT.run/
  recipe.toml         the recipe, with every default written out
  run.json            folder of the recipe's relative paths, folder of the start adapter
  train_log.jsonl     run record: start, steps, held-out losses
  step-000040/        last checkpoint: adapter, optimizer state, state.json
  best-000030/        adapter with the lowest held-out loss
  feedback.jsonl      training data exported from feedback, and the recipe that reads them
  feedback.toml
  lock                locked by the process that trains
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

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
from adapterhub.strict import Strict
from train.recipe import Recipe, read_recipe

Listener = Callable[[RunEvent], None]
_RUN_NAME, _STATE_NAME, _LOCK_NAME = "run.json", "state.json", "lock"
FEEDBACK_NAME, FEEDBACK_RECIPE_NAME = "feedback.jsonl", "feedback.toml"
_OWN_NAMES = re.compile(
    r"(step|best)-\d+|\..*\.tmp|"
    + "|".join(map(re.escape, (RECIPE_NAME, LOG_NAME, _RUN_NAME, _LOCK_NAME, FEEDBACK_NAME, FEEDBACK_RECIPE_NAME)))
)
"""Names in a run's folder; a folder with others is a person's."""


class _Run(Strict):
    recipe_folder: str
    start: str | None
    """Folder of the start adapter; None: a new adapter."""


class State(Strict):
    """State of a run after a step.

    Together with weights and optimizer state it determines the rest of the run: samples, learning rate and dropout of
    a step follow from the recipe and the number of the step.
    """

    step: int = 0
    """Number of steps done."""
    best_loss: float | None = None
    """Lowest held-out loss so far, in nats."""
    best_step: int = 0
    """Step of the lowest held-out loss."""
    num_worse: int = 0
    """Number of evaluations since the lowest held-out loss, for early stopping."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: State


class RunFolder:
    """A run's folder and lock, from `create` or `reopen`; the lock is released when their context ends."""

    def __init__(self, output: Path, recipe: Recipe, start: Path | None) -> None:
        self.output = output
        self.path = run_path(output)
        self.recipe = recipe
        self.start = start
        self.listen: Listener | None = None
        """Function called with each event that is logged."""

    @classmethod
    @contextmanager
    def create(cls, output: Path, recipe: Recipe, *, start: Adapter | None) -> Iterator[RunFolder]:
        """Create the folder of a new run and lock it; remove it again if the run ends without a checkpoint.

        Raises OutputNotFresh when `output` is not new or empty, or has a run that can be resumed.
        """
        check_fresh(output)
        path = run_path(output)
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path, output):
            if _newest(path) is not None:
                raise _stopped_run(path, output)
            _remove_leftovers(output)
            run = cls(output, recipe, start.path if start else None)
            write_atomic(path / RECIPE_NAME, recipe.to_toml())
            paths = _Run(
                recipe_folder=str(recipe.folder.absolute()), start=str(start.path.absolute()) if start else None
            )
            write_atomic(path / _RUN_NAME, paths.model_dump_json(indent=1))
            (path / LOG_NAME).unlink(missing_ok=True)
            with run._removed_if_empty():
                yield run

    @classmethod
    @contextmanager
    def reopen(cls, output: Path) -> Iterator[RunFolder]:
        """Open and lock the stopped run of `output`.

        Raises RunNotResumable when there is none, and OutputNotFresh when another process trains it.
        """
        path = run_path(output)
        recipe, start = read_run(output)
        with _locked(path, output):
            _remove_leftovers(output)
            run = cls(output, recipe, start)
            with run._removed_if_empty():
                yield run

    @property
    def created_on(self) -> date:
        """Date on which the run began, in local time."""
        return date.fromtimestamp((self.path / _RUN_NAME).stat().st_mtime)

    @property
    def newest(self) -> Checkpoint | None:
        return _newest(self.path)

    def events(self) -> list[RunEvent]:
        """Return the log up to the last checkpoint and drop the rest: those steps are run again."""
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
        """Write a checkpoint of `state`, then remove older ones; `write` fills its folder."""
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
        """Write the weights with the lowest held-out loss; older ones stay until a checkpoint names these."""
        target = self.best_at(step)
        shutil.rmtree(target, ignore_errors=True)
        with new_folder(target) as folder:
            write(folder)

    def best_at(self, step: int) -> Path:
        return self.path / f"best-{step:06d}"

    def finished(self) -> RunEnd | None:
        """Return the end of the run if its output is written and only this folder remains, else None."""
        log = self.output / LOG_NAME
        if not log.is_file():
            return None
        own, written = read_run_events(self.path / LOG_NAME, is_whole=False), read_run_events(log)
        return written[-1] if own == written and isinstance(written[-1], RunEnd) else None

    def remove(self) -> None:
        (self.path / _RUN_NAME).unlink(missing_ok=True)  # half a folder is no run to resume
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def _removed_if_empty(self) -> Iterator[None]:
        try:
            yield
        finally:
            # The exported feedback stays: processes that are restarted read it again.
            if self.path.is_dir() and self.newest is None and not (self.path / FEEDBACK_NAME).is_file():
                self.remove()


def run_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.run")


@contextmanager
def prepared_folder(output: Path) -> Iterator[Path]:
    """Create the run's folder of `output` and yield it, locked, for files that are written before the run begins.

    A stopped run keeps the files of its own. After an error a folder without a checkpoint is removed. Raises
    OutputNotFresh for folders that hold other files or a stopped run without such files, and when another process
    trains there.
    """
    check_fresh(output)
    path = run_path(output)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path, output):
        if _newest(path) is not None and not (path / FEEDBACK_RECIPE_NAME).is_file():
            raise _stopped_run(path, output)
        try:
            yield path
        except BaseException:
            _remove_unstarted(path)
            raise


def remove_unstarted(output: Path) -> None:
    """Remove the folder that `prepared_folder` made, unless it has a checkpoint or another process trains there."""
    path = run_path(output)
    if path.is_dir():
        with suppress(OutputNotFresh), _locked(path, output):
            _remove_unstarted(path)


def _stopped_run(path: Path, output: Path) -> OutputNotFresh:
    return OutputNotFresh(
        f"{path} holds a stopped run: expected none. Resume it with `adapterhub train --resume {output}`, or remove "
        "that folder."
    )


def _remove_unstarted(path: Path) -> None:
    if _newest(path) is None:
        shutil.rmtree(path, ignore_errors=True)


def kept_on_disk(output: Path, *, resume: str) -> str:
    """Return what a run of `output` that has ended left there, and what to do: `resume` where it can be resumed."""
    if (output / LOG_NAME).is_file():
        return f"the adapter is complete in {output}. It needs no other run."
    newest = _newest(run_path(output))
    if newest is None:
        return "no checkpoint was written. Start the run again."
    return f"a checkpoint of step {newest.state.step} is kept. {resume}"


def check_fresh(output: Path) -> None:
    """Check that `output` is new or an empty folder, and that no other file is where its run works.

    Raises OutputNotFresh.
    """
    path = run_path(output)
    others = sorted(one.name for one in path.iterdir() if not _OWN_NAMES.fullmatch(one.name)) if path.is_dir() else []
    if others or (path.exists() and not path.is_dir()):
        found = f"holds {', '.join(others[:3])}" if others else "is a file"
        raise OutputNotFresh(
            f"{path} {found}: the run of {output} works there and removes that folder at its end. Choose another "
            "--output, or move it away."
        )
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise OutputNotFresh(
            f"{output} already exists: expected a new or empty folder. Choose another --output, or move it away."
        )


def read_run(output: Path) -> tuple[Recipe, Path | None]:
    """Return (recipe, folder of the start adapter) of a run that can be resumed. Raises RunNotResumable."""
    path = run_path(output)
    try:
        raw = _Run.model_validate_json((path / _RUN_NAME).read_text())
    except (OSError, ValidationError) as error:
        if (output / LOG_NAME).is_file():
            raise RunNotResumable(
                f"the run of {output} is complete: expected a stopped run in {path}. Train into a new folder instead."
            ) from error
        raise RunNotResumable(
            f"{output} has no run to resume: expected {path}, which a stopped `adapterhub train` leaves. Give "
            "--resume the output folder of the stopped run."
        ) from error
    recipe = read_recipe(path / RECIPE_NAME, folder=Path(raw.recipe_folder))
    return recipe, Path(raw.start) if raw.start else None


def _newest(path: Path) -> Checkpoint | None:
    """Return the last checkpoint. A folder with the name of a step is complete, since a rename gave it that name."""
    found = sorted(path.glob("step-*"))
    if not found:
        return None
    return Checkpoint(found[-1], State.model_validate_json((found[-1] / _STATE_NAME).read_text()))


def _step_of(event: RunEvent) -> int:
    if isinstance(event, RunStep | RunMeasured | RunSampled):
        return event.step
    return 0 if isinstance(event, RunStart) else 1 << 62


def _remove_leftovers(output: Path) -> None:
    """Remove what a killed process left half-written. Needs the lock."""
    own = re.compile(re.escape(f".{output.name}.") + r"[0-9a-f]{8}\.tmp")  # and not those of OUTPUT.v2
    beside = [path for path in output.parent.iterdir() if own.fullmatch(path.name)]
    for leftover in (*beside, *run_path(output).glob(".*.tmp")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def _locked(path: Path, output: Path) -> Iterator[None]:
    lock = FileLock(path / _LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputNotFresh(
            f"another process is training {output}: expected one process per folder. Wait for it, or choose another "
            "--output."
        ) from error
    try:
        yield
    finally:
        lock.release()
