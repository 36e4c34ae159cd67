"""`adapterhub.lock`: commit and digest of each adapter of a deployment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from adapterhub.errors import InvalidManifest
from adapterhub.files import write_atomic
from adapterhub.strict import Strict, parse_json

LOCK_NAME = "adapterhub.lock"


class Locked(Strict):
    """One adapter: its name in the registry and on the Hub, and its commit and digest."""

    name: str = Field(min_length=1)
    hub: str | None = None
    """Endpoint; None: it came from no Hub."""
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")


class Lock(Strict):
    """The adapters of a deployment."""

    adapters: dict[str, Locked]
    """Name that it is served as -> adapter."""


def read_lock(path: Path) -> Lock:
    """Read a lock file. Raises InvalidManifest for any other file."""
    try:
        return Lock.model_validate(parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        faults = "; ".join(str(error).splitlines()[:4])
        raise InvalidManifest(f"{path} is not a lock file: {faults}. Write one with 'adapterhub lock'.") from error


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock file, sorted and one fact per line, so that versions can be compared."""
    ordered = Lock(adapters=dict(sorted(lock.adapters.items())))
    write_atomic(path, ordered.model_dump_json(indent=1) + "\n")
