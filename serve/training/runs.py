"""Training runs started by a server: child processes of the installed command, and their records on disk.

Knows recipes as text only; what they mean, and the training, is the command's. One run at a time.

    <home>/training/
      data/                    where an administrator puts data sets
      RUN.toml                 the recipe as sent; its relative paths start here
      RUN.json  RUN.log        the record; what the command said
      RUN  RUN.run             the adapter; the run's own folder until there is one
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
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from adapterhub.errors import TrainingBusy, TrainingRunNotFound, UsageError
from adapterhub.files import write_atomic
from adapterhub.package.manifest import MANIFEST_NAME
from adapterhub.package.run_record import LOG_NAME, RunEnd, RunEvent, RunMeasured, RunSampled, RunStep, read_run_events

Status = Literal["running", "stopped", "failed", "done"]

_PLAN_TIMEOUT_S = 300
_MAX_MESSAGE = 500


class _Record(BaseModel):
    """What a restarted server knows of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    created: int
    pid: int
    started: float
    """of the process, by the system's clock of processes: a pid alone may be another's by now"""
    is_stop_wanted: bool = False
    improves: str | None = None


@dataclass(frozen=True)
class TrainingRun:
    """A run as a client sees it."""

    id: str
    created: int
    status: Status
    recipe: str
    steps: tuple[RunStep, ...]
    measured: tuple[RunMeasured, ...]
    sampled: tuple[RunSampled, ...]
    end: RunEnd | None
    """what it came to"""
    improves: str | None
    """the name of the adapter whose feedback it learns from"""
    output: Path | None
    """the adapter's folder, once it is complete"""
    message: str
    """the last thing the command said"""


class TrainingRuns:
    """Owns `folder`. Children outlive the server, which finds them again by their records."""

    def __init__(self, folder: Path, command: Path | None = None) -> None:
        self.folder = folder
        self._command = command or Path(sys.executable).with_name("adapterhub")
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._starting = asyncio.Lock()

    async def recipes(self) -> list[dict[str, str]]:
        """Name and TOML of each recipe that comes with adapterhub."""
        shipped = json.loads(await self._ask("recipes", "--json"))
        return [{"name": entry["name"], "toml": entry["toml"]} for entry in shipped]

    async def plan(self, recipe: str) -> dict[str, Any]:
        """What `adapterhub train --plan` says of a recipe. Raises UsageError with its refusal."""
        check_paths(recipe)
        path = self.folder / f"plan-{secrets.token_hex(4)}.toml"
        write_atomic(path, recipe)
        try:
            found = json.loads(await self._ask("train", str(path), "--plan", "--json"))
        finally:
            path.unlink()
        return dict(found)

    async def start(self, recipe: str, *, improves: str | None = None) -> TrainingRun:
        """Raises UsageError for a recipe that reaches beyond the data folder, TrainingBusy."""
        check_paths(recipe)
        async with self._starting:
            self._check_idle()
            name = f"run-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
            write_atomic(self.folder / f"{name}.toml", recipe)
            self._launch(name, *self._anew(name), improves=improves)
            return self.get(name)

    async def pack(self, name: str) -> None:
        """Make what a run left a package. Raises TrainingRunNotFound, UsageError where there is nothing to pack yet."""
        run = await asyncio.to_thread(self.get, name)
        if run.output is None:
            raise UsageError(f"run {name} is {run.status}, not done: there is nothing to pack yet.")
        async with self._starting:
            if not (run.output / MANIFEST_NAME).is_file():
                called = tomllib.loads(run.recipe).get("name", name)
                await self._ask("pack", str(run.output), "--name", str(called))

    async def resume(self, name: str) -> TrainingRun:
        """Raises TrainingRunNotFound, TrainingBusy, and UsageError for a run that is complete."""
        async with self._starting:
            run = self.get(name)
            if run.status == "done":
                raise UsageError(f"run {name} is complete: start another one.")
            self._check_idle()
            # A run that had no checkpoint yet left nothing to go on from.
            if any(self._run_folder(name).glob("step-*")):
                self._launch(name, "--resume", str(self.folder / name), improves=run.improves)
            else:
                self._launch(name, *self._anew(name), improves=run.improves)
            return self.get(name)

    async def stop(self, name: str) -> TrainingRun:
        """Ask the run to write a checkpoint and end; it does so after its step. Raises TrainingRunNotFound."""
        # Nothing is awaited up to the signal, so that nothing is launched between reading the record and writing it.
        record = self._read(name)
        if self._is_alive(record):
            self._write(record.model_copy(update={"is_stop_wanted": True}))
            with suppress(ProcessLookupError):  # ended meanwhile
                os.killpg(record.pid, signal.SIGTERM)
        return await asyncio.to_thread(self.get, name)

    def all(self) -> list[TrainingRun]:
        """Newest first."""
        names = [path.stem for path in self.folder.glob("run-*.json")]
        return sorted((self.get(name) for name in names), key=lambda run: (run.created, run.id), reverse=True)

    def get(self, name: str) -> TrainingRun:
        """Raises TrainingRunNotFound."""
        record = self._read(name)
        is_alive = self._is_alive(record)  # asked first: one that completes meanwhile is not taken for failed
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
        )

    def _check_idle(self) -> None:
        for path in self.folder.glob("run-*.json"):
            if self._is_alive(self._read(path.stem)):
                raise TrainingBusy(f"run {path.stem} is going on, and there is one at a time: stop it, or wait.")

    def _anew(self, name: str) -> tuple[str, ...]:
        return str(self.folder / f"{name}.toml"), "--output", str(self.folder / name)

    def _launch(self, name: str, *arguments: str, improves: str | None) -> None:
        """In a process group of its own: a Ctrl-C meant for the server does not reach it, a stop reaches all of it."""
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                [self._command, "train", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._children[name] = child
        started = _start_of_process(child.pid) or 0.0
        earlier = self.folder / f"{name}.json"
        created = self._read(name).created if earlier.is_file() else int(time.time())
        self._write(_Record(id=name, created=created, pid=child.pid, started=started, improves=improves))

    def _is_alive(self, record: _Record) -> bool:
        child = self._children.get(record.id)
        if child is not None and child.pid == record.pid:
            return child.poll() is None
        return _start_of_process(record.pid) == record.started

    async def _ask(self, *arguments: str) -> bytes:
        child = await asyncio.create_subprocess_exec(
            self._command, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            out, said = await asyncio.wait_for(child.communicate(), _PLAN_TIMEOUT_S)
        except TimeoutError as error:
            raise UsageError(f"no answer within {_PLAN_TIMEOUT_S} s: try it with the command itself.") from error
        finally:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        if child.returncode:
            raise UsageError(_last_line(said.decode(errors="replace")))
        return out

    def _events(self, folder: Path) -> list[RunEvent]:
        log = folder / LOG_NAME
        try:
            return read_run_events(log, is_whole=False)
        except FileNotFoundError:  # not begun, or moved into its place this moment
            return []

    def _run_folder(self, name: str) -> Path:
        return self.folder / f"{name}.run"

    def _last_line(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        if not path.is_file():
            return ""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        # The command ends with advice for a terminal and the folder for a script.
        told = [line for line in lines if not line.startswith("next: ") and line != str(self.folder / name)]
        return _last_line("\n".join(told))

    def _read(self, name: str) -> _Record:
        path = self.folder / f"{name}.json"
        if "/" in name or not name.startswith("run-") or not path.is_file():
            raise TrainingRunNotFound(f"there is no training run {name}: GET /v1/training/runs lists them.")
        try:
            return _Record.model_validate_json(path.read_text())
        except ValidationError as error:
            raise TrainingRunNotFound(f"the record of run {name} is damaged: remove {path.name}.") from error

    def _write(self, record: _Record) -> None:
        write_atomic(self.folder / f"{record.id}.json", record.model_dump_json())


def _status(record: _Record, *, is_alive: bool, is_complete: bool) -> Status:
    if is_alive:
        return "running"
    if is_complete:
        return "done"
    return "stopped" if record.is_stop_wanted else "failed"


def check_paths(recipe: str) -> None:
    """A client may not choose files on the server's disk, but those below the folder of training data.

    Raises UsageError. Everything else that may be wrong with a recipe is for the command to say.
    """
    try:
        raw = tomllib.loads(recipe)
    except (ValueError, RecursionError) as error:  # tomllib's own, a number too long, brackets too deep
        raise UsageError(f"the recipe is not TOML: {error}.") from error
    data = raw.get("data")
    for key in ("path", "template"):
        path = data.get(key) if isinstance(data, dict) else None
        if isinstance(path, str) and (Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts):
            raise UsageError(
                f"{key} = {path!r} leaves the server's training folder: put the file into its data/ and write "
                "data/NAME."
            )
    for key in ("base", "start"):
        if str(raw.get(key, "")).startswith(("/", ".", "~")):
            raise UsageError(f"{key} = {raw[key]!r} is a path on the server's disk, which clients may not choose.")


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1].removeprefix("adapterhub: ")[:_MAX_MESSAGE] if lines else ""


def _start_of_process(pid: int) -> float | None:
    """When a living process began, in the kernel's ticks; None when there is none (or it only waits to be buried)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if not _exists(pid) else 0.0
    return None if fields[0] == "Z" else float(fields[19])


def _exists(pid: int) -> bool:
    """Where the system has no /proc."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
