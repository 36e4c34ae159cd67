"""Training runs of a server: child processes of the installed command, one at a time, and their records on disk.

<home>/training/
  data/                    data sets, put there by an administrator
  RUN.toml                 the recipe as sent; its relative paths start here
  RUN.json  RUN.log        the record; the command's output
  RUN  RUN.run             the adapter; the run folder until there is one
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import ValidationError

from adapterhub.errors import TrainingBusy, TrainingRunNotFound, UsageError
from adapterhub.files import write_atomic
from adapterhub.package.manifest import MANIFEST_NAME
from adapterhub.package.run_record import LOG_NAME, RunEnd, RunEvent, RunMeasured, RunSampled, RunStep, read_run_events
from adapterhub.strict import Strict

Status = Literal["running", "stopped", "failed", "done"]

_PLAN_TIMEOUT_S = 300
_START_TOLERANCE_S = 1.5
_MAX_MESSAGE = 500
_KILL_TIMEOUT_S = 10
"""Maximum wait for a killed process to end."""


class _RunRecord(Strict):
    """Record of a run, from which a restarted server finds it again."""

    id: str
    created: int
    pid: int
    started: float
    """Start of the process, in seconds since the boot: its pid may belong to another process by now."""
    is_stop_wanted: bool = False
    improves: str | None = None


@dataclass(frozen=True)
class TrainingRun:
    """A run as the API shows it."""

    id: str
    created: int
    status: Status
    recipe: str
    steps: tuple[RunStep, ...]
    measured: tuple[RunMeasured, ...]
    sampled: tuple[RunSampled, ...]
    end: RunEnd | None
    """Result of a completed run."""
    improves: str | None
    """Name of the adapter that the run improves from feedback."""
    output: Path | None
    """Folder of the adapter, once it is complete."""
    message: str
    """Last line of the command's output."""
    is_stopping: bool = False
    """Whether the run was asked to stop and has not ended yet."""


class TrainingRuns:
    """The runs in `folder`. Child processes outlive the server, which finds them again by their records."""

    def __init__(self, folder: Path, command: Path | None = None) -> None:
        self.folder = folder
        self._command = command or Path(sys.executable).with_name("adapterhub")
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._starting = asyncio.Lock()

    async def recipes(self) -> list[dict[str, str]]:
        """Return the name and TOML of each shipped recipe."""
        shipped = json.loads(await self._run_command("recipes", "--json"))
        return [{"name": entry["name"], "toml": entry["toml"]} for entry in shipped]

    async def plan(self, recipe: str) -> dict[str, Any]:
        """Return the output of `adapterhub train --plan`. Raises UsageError with its error."""
        check_paths(recipe)
        path = self.folder / f"plan-{secrets.token_hex(4)}.toml"
        write_atomic(path, recipe)
        try:
            found = json.loads(await self._run_command("train", str(path), "--plan", "--json"))
        finally:
            path.unlink()
        return dict(found)

    async def start(self, recipe: str, *, improves: str | None = None) -> TrainingRun:
        """Start a run. Raises UsageError for a recipe with paths outside the data folder, TrainingBusy."""
        check_paths(recipe)
        async with self._starting:
            self._check_idle()
            name = f"run-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
            write_atomic(self.folder / f"{name}.toml", recipe)
            self._launch(name, *self._anew(name), improves=improves)
            return self.get(name)

    async def pack(self, name: str, *, license: str | None = None) -> None:
        """Pack the adapter of a run, unless it is packed. Without a license it gets the base's.

        Raises TrainingRunNotFound, UsageError for a run that is not complete.
        """
        run = await asyncio.to_thread(self.get, name)
        if run.output is None:
            raise UsageError(f"run {name} is {run.status}: expected a run that is done. Wait for it, or resume it.")
        async with self._starting:
            if not (run.output / MANIFEST_NAME).is_file():
                called = tomllib.loads(run.recipe).get("name", name)
                license_given = ("--license", license) if license else ()
                await self._run_command("pack", str(run.output), "--name", str(called), *license_given)

    async def resume(self, name: str) -> TrainingRun:
        """Resume a run. Raises TrainingRunNotFound, TrainingBusy, and UsageError for a run that is complete."""
        async with self._starting:
            run = self.get(name)
            if run.status == "done":
                raise UsageError(f"run {name} is complete: expected one that stopped or failed. Start another run.")
            self._check_idle()
            # Without a checkpoint, the run starts anew.
            if any(self._run_folder(name).glob("step-*")):
                self._launch(name, "--resume", str(self.folder / name), improves=run.improves)
            else:
                self._launch(name, *self._anew(name), improves=run.improves)
            return self.get(name)

    async def stop(self, name: str) -> TrainingRun:
        """Ask a run once to stop after its step, with a checkpoint; asking again changes nothing.

        Raises TrainingRunNotFound.
        """
        # No await before the signal, so that nothing is launched between reading the record and writing it.
        record = self._read(name)
        if self._is_alive(record) and not record.is_stop_wanted:
            self._signal(record, signal.SIGTERM)
        return await asyncio.to_thread(self.get, name)

    async def kill(self, name: str) -> TrainingRun:
        """Kill a run that does not end at a stop; the steps since its last checkpoint are lost.

        Raises TrainingRunNotFound.
        """
        record = self._read(name)
        if self._is_alive(record):
            self._signal(record, signal.SIGKILL)
            until = time.monotonic() + _KILL_TIMEOUT_S
            while self._is_alive(record) and time.monotonic() < until:
                await asyncio.sleep(0.01)
            if not (self.folder / name / LOG_NAME).is_file():  # else it ended meanwhile
                with (self.folder / f"{name}.log").open("a", encoding="utf-8") as log:
                    log.write(f"killed: {self._kept(name)}. Resume the run, or start another one.\n")
        return await asyncio.to_thread(self.get, name)

    def _signal(self, record: _RunRecord, number: signal.Signals) -> None:
        self._write(record.model_copy(update={"is_stop_wanted": True}))
        with suppress(ProcessLookupError):  # ended meanwhile
            os.killpg(record.pid, number)

    def _kept(self, name: str) -> str:
        """Return which checkpoint of a run is on disk."""
        checkpoints = sorted(self._run_folder(name).glob("step-*"))
        if not checkpoints:
            return "no checkpoint was written"
        return f"a checkpoint of step {int(checkpoints[-1].name.removeprefix('step-'))} is kept"

    def all(self) -> list[TrainingRun]:
        """List all runs, newest first."""
        names = [path.stem for path in self.folder.glob("run-*.json")]
        return sorted((self.get(name) for name in names), key=lambda run: (run.created, run.id), reverse=True)

    def get(self, name: str) -> TrainingRun:
        """Return a run. Raises TrainingRunNotFound."""
        record = self._read(name)
        is_alive = self._is_alive(record)  # checked first: a run that completes meanwhile has not failed
        output = self.folder / name
        is_complete = (output / LOG_NAME).is_file()
        events = self._events(output if is_complete else self._run_folder(name))
        return TrainingRun(
            id=name,
            created=record.created,
            status=_status(record, is_alive=is_alive, is_complete=is_complete),
            recipe=(self.folder / f"{name}.toml").read_text(encoding="utf-8"),
            steps=tuple(event for event in events if isinstance(event, RunStep)),
            measured=tuple(event for event in events if isinstance(event, RunMeasured)),
            sampled=tuple(event for event in events if isinstance(event, RunSampled)),
            end=next((event for event in events if isinstance(event, RunEnd)), None) if is_complete else None,
            improves=record.improves,
            output=output if is_complete else None,
            message=self._last_line(name),
            is_stopping=is_alive and record.is_stop_wanted,
        )

    def _check_idle(self) -> None:
        for path in self.folder.glob("run-*.json"):
            if self._is_alive(self._read(path.stem)):
                raise TrainingBusy(
                    f"run {path.stem} is running: this server trains one run at a time. Stop it, or wait."
                )

    def _anew(self, name: str) -> tuple[str, ...]:
        return str(self.folder / f"{name}.toml"), "--output", str(self.folder / name)

    def _launch(self, name: str, *arguments: str, improves: str | None) -> None:
        """Start the process in a group of its own: Ctrl+C at the server does not reach it."""
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [self._command, "train", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._children[name] = child
        started = _start_of_process(child.pid) or 0.0
        earlier = self.folder / f"{name}.json"
        created = self._read(name).created if earlier.is_file() else int(time.time())
        self._write(_RunRecord(id=name, created=created, pid=child.pid, started=started, improves=improves))

    def _is_alive(self, record: _RunRecord) -> bool:
        child = self._children.get(record.id)
        if child is not None and child.pid == record.pid:
            return child.poll() is None
        found = _start_of_process(record.pid)
        return found is not None and _is_start(found, record.started)

    async def _run_command(self, *arguments: str) -> bytes:
        child = await asyncio.create_subprocess_exec(
            self._command, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = await asyncio.wait_for(child.communicate(), _PLAN_TIMEOUT_S)
        except TimeoutError as error:
            raise UsageError(
                f"'adapterhub {arguments[0]}' took over {_PLAN_TIMEOUT_S} s: it was stopped. Run it in a terminal."
            ) from error
        finally:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        if child.returncode:
            raise UsageError(_last_line(errors.decode(errors="replace")))
        return output

    def _events(self, folder: Path) -> list[RunEvent]:
        log = folder / LOG_NAME
        try:
            return read_run_events(log, is_whole=False)
        except FileNotFoundError:  # not started yet, or being moved into place
            return []

    def _run_folder(self, name: str) -> Path:
        return self.folder / f"{name}.run"

    def _last_line(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        if not path.is_file():
            return ""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        # The last lines are advice for a terminal and the folder for a script.
        lines = [line for line in lines if not line.startswith("next: ") and line != str(self.folder / name)]
        return _last_line("\n".join(lines))

    def _read(self, name: str) -> _RunRecord:
        path = self.folder / f"{name}.json"
        if "/" in name or not name.startswith("run-") or not path.is_file():
            raise TrainingRunNotFound(
                f"unknown training run {name!r}: expected one of this server's. List them with GET /v1/training/runs."
            )
        try:
            return _RunRecord.model_validate_json(path.read_text())
        except ValidationError as error:
            raise TrainingRunNotFound(
                f"the record of run {name} is damaged: expected JSON. Remove {path.name} on the server."
            ) from error

    def _write(self, record: _RunRecord) -> None:
        write_atomic(self.folder / f"{record.id}.json", record.model_dump_json())


def _status(record: _RunRecord, *, is_alive: bool, is_complete: bool) -> Status:
    if is_alive:
        return "running"
    if is_complete:
        return "done"
    return "stopped" if record.is_stop_wanted else "failed"


def check_paths(recipe: str) -> None:
    """Check that a client's recipe has no paths outside the folder of training data. Raises UsageError.

    The command checks the rest of the recipe.
    """
    try:
        raw = tomllib.loads(recipe)
    except (ValueError, RecursionError) as error:  # tomllib's own, a number too long, brackets too deep
        raise UsageError(f"the recipe is not valid TOML: {error}. Correct it.") from error
    data = raw.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    tables = [table for table in (data, *(sources if isinstance(sources, list) else ())) if isinstance(table, dict)]
    for table, key in product(tables, ("path", "template")):
        path = table.get(key)
        if isinstance(path, str) and (Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts):
            raise UsageError(
                f"{key} = {path!r} is outside the server's training folder: expected data/NAME. Put the file "
                "into data/ there."
            )
    for key in ("base", "start"):
        if str(raw.get(key, "")).startswith(("/", ".", "~")):
            raise UsageError(
                f"{key} = {raw[key]!r} is a path on the server's disk: expected a name. Use one that the server knows."
            )


def _last_line(output: str) -> str:
    """Return the last line of an output, or its last error with the indented lines of its faults."""
    lines = output.strip().splitlines()
    start = len(lines) - 1
    while start > 1 and lines[start - 1].startswith("  "):
        start -= 1
    start -= start < len(lines) - 1
    return "\n".join(lines[start:]).removeprefix("adapterhub: ")[:_MAX_MESSAGE] if lines else ""


def _start_of_process(pid: int) -> float | None:
    """Return when a living process began, in seconds since the boot; None when there is none, or only a zombie.

    The difference of two times of the same clock, so that setting the clock does not change it.
    """
    try:
        process = psutil.Process(pid)
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if is_zombie else process.create_time() - psutil.boot_time()
    except psutil.Error:
        return None


def _is_start(found_s: float, recorded: float) -> bool:
    """Compare up to the second that the boot time is known to. Records of 0.1.0 hold clock ticks on Linux."""
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return any(abs(found_s - start_s) < _START_TOLERANCE_S for start_s in (recorded, recorded / ticks_per_s))
