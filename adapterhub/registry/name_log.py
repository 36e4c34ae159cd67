"""The targets of names and their history: one append-only log of moves per name. A revision's last move counts.

Each line is a JSON object that ends in a line feed. A last line without one, or with a NUL byte, was left by a killed
writer or a power cut: it is no move, and the next writer cuts it off. All writers share one lock.
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
from pydantic import AwareDatetime, Field

from adapterhub.errors import InvalidManifest
from adapterhub.files import make_folder, raise_storage_full, sync
from adapterhub.package.manifest import LICENSE_NAMES, Manifest
from adapterhub.strict import Strict, parse_json

_SUFFIX = ".jsonl"

Act = Literal["add", "import", "pull", "promote", "rollback", "remove"]


class Summary(Strict):
    """What lists show of a package. The log has it, so that a list opens no package."""

    base: str
    fingerprint: str
    rank: int
    method: str
    license: str | None = Field(validation_alias=LICENSE_NAMES, serialization_alias="licence")
    """SPDX id; in the log `licence`, which 0.1.0 reads: its processes may share the store."""

    @classmethod
    def of(cls, manifest: Manifest) -> Summary:
        """Summarize a manifest."""
        base, lora = manifest.base, manifest.lora
        return cls(
            base=base.id, fingerprint=base.fingerprint, rank=lora.rank, method=lora.method, license=manifest.license
        )


class Move(Strict):
    """One line of a log: who moved a revision of a name from one digest to another, and when."""

    at: AwareDatetime
    """Time by the writer's clock. The order of moves is that of the lines."""
    by: str
    act: Act
    revision: str
    before: str | None
    """Digest; None: there was no such revision."""
    after: str | None
    """Digest; None: the revision was removed."""
    origin: str = "local"
    """Where the package came from: a Hub endpoint and commit, or `local`."""
    about: Summary | None = None


@dataclass(frozen=True)
class Name:
    """A name and all its moves, oldest first."""

    name: str
    moves: tuple[Move, ...]

    def revisions(self) -> dict[str, Move]:
        """Return each existing revision with its last move."""
        last = {move.revision: move for move in self.moves}
        return {revision: move for revision, move in sorted(last.items()) if move.after is not None}

    def target(self, revision: str) -> str | None:
        """Return the digest that `revision` points to, or None when there is no such revision."""
        move = self.revisions().get(revision)
        return move.after if move else None

    def before(self, revision: str) -> str | None:
        """Return the digest that a rollback of `revision` points it to; None without one."""
        targets: list[str | None] = []
        for move in self.moves:
            if move.revision != revision:
                continue
            if move.act == "rollback" and targets:
                targets.pop()
            else:
                targets.append(move.after)
        return targets[-2] if len(targets) > 1 else None

    def references(self, *, since: datetime) -> set[str]:
        """Return the digests a revision points to, would roll back to, or pointed to at any time after `since`."""
        revisions = self.revisions()
        referenced = {move.after for move in revisions.values()} | {self.before(revision) for revision in revisions}
        for move in self.moves:
            if move.at >= since:  # a clock ahead of ours keeps a package longer, never shorter
                referenced |= {move.before, move.after}
        return {digest for digest in referenced if digest is not None}

    def find(self, text: str) -> list[str]:
        """Return the digests that begin with `text`, or of packages fetched at commit `text`; newest first."""
        found = [
            move.after
            for move in reversed(self.moves)
            if move.after is not None and (move.after.startswith(text) or move.origin.endswith(f" {text}"))
        ]
        return list(dict.fromkeys(found))


def default_actor() -> str:
    """Return `user@machine` of this process, for the log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def now() -> datetime:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class NameLog:
    """The logs of all names in one folder."""

    folder: Path

    def read(self, name: str) -> Name | None:
        """Return the log of a name, None for one that was never used. Raises InvalidManifest for a damaged log."""
        try:
            return _read(self._path(name), name)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Return every name that was ever used, sorted."""
        if not self.folder.is_dir():
            return []
        return sorted(unquote(file.removesuffix(_SUFFIX)) for file in os.listdir(self.folder) if file.endswith(_SUFFIX))

    def all(self) -> Iterator[Name]:
        """Yield the log of every name, sorted."""
        for name in self.names():
            if (found := self.read(name)) is not None:
                yield found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from appending while the block runs."""
        make_folder(self.folder)
        with FileLock(self.folder / ".lock"):
            yield

    def append(self, name: str, moves: Sequence[Move]) -> None:
        """Append moves together, under `locked`. They are on disk when this returns.

        Raises StorageFull, and then nothing was appended.
        """
        path = self._path(name)
        lines = "".join(move.model_dump_json(by_alias=True) + "\n" for move in moves).encode()
        # Unbuffered: a buffer would write the rest of a line when the file is closed, after it was truncated.
        with raise_storage_full(path), path.open("ab", buffering=0) as file:
            whole = len(_whole_lines(path))
            file.truncate(whole)
            try:
                while lines:
                    lines = lines[file.write(lines) :]
                os.fsync(file.fileno())
                if not whole:  # also of one that a killed process made and did not flush
                    sync(self.folder)
            except OSError:
                file.truncate(whole)
                raise

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}{_SUFFIX}"


def _whole_lines(path: Path) -> bytes:
    """Return the bytes up to and including the last line feed, without a last line that has NUL bytes.

    A file system may have made a file longer and not written it yet when the power fails; then it has NUL bytes there.
    """
    data = path.read_bytes()
    data = data[: data.rfind(b"\n") + 1]
    last = data.rfind(b"\n", 0, -1) + 1
    return data[:last] if b"\0" in data[last:] else data


def _read(path: Path, name: str) -> Name:
    moves = []
    for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], 1):
        try:
            moves.append(Move.model_validate(parse_json(line)))
        except ValueError as error:
            raise InvalidManifest(
                f"{path}:{number} is damaged: expected a move as JSON. Restore the file, or delete it and pull or add "
                f"{name} again."
            ) from error
    return Name(name, tuple(moves))
