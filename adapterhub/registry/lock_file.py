"""`adapterhub.lock`: the exact adapters of a deployment, name by name: commit and digest. Knows no registry."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from adapterhub.errors import InvalidManifest
from adapterhub.files import write_atomic
from adapterhub.strict import Strict

LOCK_NAME = "adapterhub.lock"


class Locked(Strict):
    """One adapter: what it is called in the registry and on the Hub, and exactly which it is."""

    name: str = Field(min_length=1)
    hub: str | None = None
    """endpoint; None: it came from no Hub"""
    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")


class Lock(Strict):
    """What a deployment answers with: the name it is served as -> the adapter."""

    adapters: dict[str, Locked]


def read_lock(path: Path) -> Lock:
    """Raises InvalidManifest for a file that is no lock."""
    try:
        return Lock.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        faults = "; ".join(str(error).splitlines()[:4])
        raise InvalidManifest(f"{path} is not a lock file ({faults}): write it with `adapterhub lock`.") from error


def write_lock(path: Path, lock: Lock) -> None:
    """Sorted, one line a fact: made to be committed and compared."""
    ordered = Lock(adapters=dict(sorted(lock.adapters.items())))
    write_atomic(path, ordered.model_dump_json(indent=1) + "\n")
