"""Remember which self-checks passed on this machine, so that the next run or server starts without them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from adapterhub.errors import StorageFull
from adapterhub.files import write_atomic
from adapterhub.paths import home

_VERSIONS_OF = ("adapterhub", "transformers", "torch", "peft", "bitsandbytes")
"""Packages that compute a base: another version of one is another thing to check."""


def is_proven(kind: str, fingerprint: str, **facts: str) -> bool:
    """Return whether this check (`kind`) passed on this base with the same facts and the same library versions.

    Facts are what the outcome depends on, such as the dtype and the method. A damaged or unreadable record counts as
    no record.
    """
    record = _record(kind, fingerprint, facts)
    try:
        return bool(json.loads(_path(record).read_bytes()) == record)
    except (OSError, ValueError):
        return False


def remember(kind: str, fingerprint: str, **facts: str) -> None:
    """Record that the check passed. A disk that cannot be written to costs the next start its time, no more."""
    record = _record(kind, fingerprint, facts)
    with contextlib.suppress(OSError, StorageFull):
        write_atomic(_path(record), json.dumps(record, indent=2, sort_keys=True) + "\n")


def _record(kind: str, fingerprint: str, facts: dict[str, str]) -> dict[str, str | dict[str, str]]:
    versions = {name: _version(name) for name in _VERSIONS_OF}
    return {"kind": kind, "fingerprint": fingerprint, "facts": facts, "versions": versions}


def _path(record: dict[str, str | dict[str, str]]) -> Path:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return home() / "self-checks" / f"{digest[:32]}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
