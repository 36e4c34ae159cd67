"""Where names lead and how they came to: one append-only log of moves a name, the last move of a revision counts.

One JSON object a line. A line is there when its line feed is: what a killed writer left behind is no move, and the
next writer cuts it off. Knows no packages and no disk but its own folder; one lock for all writers.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from filelock import FileLock
from pydantic import AwareDatetime, Field, ValidationError

from adapterhub.errors import InvalidManifest
from adapterhub.files import raise_storage_full
from adapterhub.package.manifest import LICENSE_NAMES, Manifest
from adapterhub.strict import Strict

_SUFFIX = ".jsonl"

Act = Literal["add", "import", "pull", "promote", "rollback", "remove"]


class Summary(Strict):
    """What lists show of a package, written down when a name is led to it, so that they need not open it."""

    base: str
    fingerprint: str
    rank: int
    method: str
    license: str | None = Field(validation_alias=LICENSE_NAMES)

    @classmethod
    def of(cls, manifest: Manifest) -> Summary:
        base, lora = manifest.base, manifest.lora
        return cls(
            base=base.id, fingerprint=base.fingerprint, rank=lora.rank, method=lora.method, license=manifest.license
        )


class Move(Strict):
    """One line: who led a revision of a name from one digest to another, and when."""

    at: AwareDatetime
    """by the writer's clock, so the order of moves is that of lines"""
    by: str
    act: Act
    revision: str
    before: str | None
    """digest; None: there was no such revision"""
    after: str | None
    """digest; None: there is none any more"""
    origin: str = "local"
    """where the package came from: a Hub endpoint and commit, or `local`"""
    about: Summary | None = None


@dataclass(frozen=True)
class Name:
    """A name and all its moves, oldest first."""

    name: str
    moves: tuple[Move, ...]

    def revisions(self) -> dict[str, Move]:
        """Revision -> the move that made it lead where it leads now."""
        last = {move.revision: move for move in self.moves}
        return {revision: move for revision, move in sorted(last.items()) if move.after is not None}

    def target(self, revision: str) -> str | None:
        """Return the digest that `revision` points to, or None when there is no such revision."""
        move = self.revisions().get(revision)
        return move.after if move else None

    def before(self, revision: str) -> str | None:
        """Where a rollback of `revision` leads: what it led to before, rollbacks taken back; None when nowhere."""
        led: list[str | None] = []
        for move in self.moves:
            if move.revision != revision:
                continue
            if move.act == "rollback" and led:
                led.pop()
            else:
                led.append(move.after)
        return led[-2] if len(led) > 1 else None

    def holds(self, *, since: datetime) -> set[str]:
        """Digests a revision leads to, would roll back to, or led to at any time after `since`."""
        revisions = self.revisions()
        held = {move.after for move in revisions.values()} | {self.before(revision) for revision in revisions}
        for move in self.moves:
            if move.at >= since:  # a clock ahead of ours holds longer, never shorter
                held |= {move.before, move.after}
        return {digest for digest in held if digest is not None}

    def find(self, text: str) -> Move | None:
        """The newest move to a digest that begins with `text`, or fetched at commit `text`."""
        for move in reversed(self.moves):
            if move.after is not None and (move.after.startswith(text) or move.origin.endswith(f" {text}")):
                return move
        return None


def default_actor() -> str:
    """`user@machine` of this process, for the log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def now() -> datetime:
    """UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class NameLog:
    """The logs of all names in one folder."""

    folder: Path

    def read(self, name: str) -> Name | None:
        """None for a name nobody ever used. Raises InvalidManifest for a damaged log."""
        try:
            return _read(self._path(name), name)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(unquote(file.removesuffix(_SUFFIX)) for file in os.listdir(self.folder) if file.endswith(_SUFFIX))

    def all(self) -> Iterator[Name]:
        """Every name, sorted."""
        for name in self.names():
            if (found := self.read(name)) is not None:
                yield found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process appends meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield

    def append(self, name: str, moves: Sequence[Move]) -> None:
        """Write moves down together, under `locked`; on disk when this returns.

        Raises StorageFull, and then nothing has moved.
        """
        path = self._path(name)
        lines = "".join(move.model_dump_json() + "\n" for move in moves).encode()
        # No buffer: it would write what is left of a line when it closes, behind the cut.
        with raise_storage_full(path), path.open("ab", buffering=0) as file:
            whole = _whole_bytes(path)
            file.truncate(whole)
            try:
                while lines:
                    lines = lines[file.write(lines) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}{_SUFFIX}"


def _whole_bytes(path: Path) -> int:
    """Length up to and with the last line feed."""
    return path.read_bytes().rfind(b"\n") + 1


def _read(path: Path, name: str) -> Name:
    lines = path.read_bytes().split(b"\n")[:-1]
    moves = []
    for number, line in enumerate(lines, 1):
        try:
            moves.append(Move.model_validate_json(line))
        except ValidationError as error:
            raise InvalidManifest(
                f"{path}:{number} is damaged: restore the file, or delete it and pull or add {name} again."
            ) from error
    return Name(name, tuple(moves))
