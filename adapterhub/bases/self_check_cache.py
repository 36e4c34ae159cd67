"""Remember which self-checks passed on this machine, so that the next run or server starts without them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import StorageFull
from adapterhub.files import write_atomic
from adapterhub.paths import home

if TYPE_CHECKING:
    import torch

_VERSIONS_OF = ("adapterhub", "transformers", "torch", "peft", "bitsandbytes")
"""Packages that compute a base: another version of one is another thing to check."""


def is_proven(kind: str, fingerprint: str | None, **facts: str) -> bool:
    """Return whether this check (`kind`) passed on this base with the same facts and the same library versions.

    Facts are what the outcome depends on, such as the dtype and the method. A damaged or unreadable record counts as
    no record. Of a base without a fingerprint, nothing is known.
    """
    if fingerprint is None:
        return False
    record = _record(kind, fingerprint, facts)
    try:
        return bool(json.loads(_path(record).read_bytes()) == record)
    except (OSError, ValueError):
        return False


def remember(kind: str, fingerprint: str | None, **facts: str) -> None:
    """Record that the check passed. A disk that cannot be written to costs the next start its time, no more."""
    if fingerprint is None:
        return
    record = _record(kind, fingerprint, facts)
    with contextlib.suppress(OSError, StorageFull):
        write_atomic(_path(record), json.dumps(record, indent=2, sort_keys=True) + "\n")


def machine_of(device: torch.device) -> str:
    """Return what computes on a device, as a fact: the GPU, or the instructions by which libraries choose CPU kernels.

    A data folder may be shared by machines, and one machine may have several GPUs.
    """
    import torch
    from bitsandbytes.functional import has_avx512bf16

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    bf16 = ", AVX512-BF16" if has_avx512bf16() else ""
    return f"{device.type} with {torch.backends.cpu.get_cpu_capability()}{bf16}"


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
