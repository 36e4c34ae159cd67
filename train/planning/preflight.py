"""Checks before a run: room on disk, memory, and the Hub's token."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field

from adapterhub.adapter import StoredBase
from adapterhub.errors import HubError, NotAuthorized, StorageFull
from adapterhub.hub.client import Hub
from adapterhub.memory.estimate import total
from adapterhub.memory.training import disk_items
from adapterhub.paths import home
from adapterhub.strict import Strict
from adapterhub.units import format_bytes
from train.recipe import Recipe


class HubAccess(Strict):
    """What the configured Hub answers about the configured token; without a token nothing is asked."""

    endpoint: str
    user: str | None
    can_push: bool
    note: str
    problems: list[str] = Field(default_factory=list)


def hub_access(hub: Hub | None = None) -> HubAccess:
    """Return what the token may do on the Hub."""
    hub = hub or Hub.from_environment()

    def access(note: str, *problems: str, user: str | None = None, can_push: bool = False) -> HubAccess:
        return HubAccess(endpoint=hub.endpoint, user=user, can_push=can_push, note=note, problems=list(problems))

    try:
        account = hub.account()
    except NotAuthorized as error:
        # Nothing else works with such a token either: a Hub refuses even public repositories to it.
        return access("the token is not known there", str(error))
    except HubError as error:
        return access(f"nothing can be pulled or pushed now: {error}")
    if account is None:
        return access("no token: public bases can be pulled; set HF_TOKEN to push the adapter")
    may = "may push" if account.can_write else "may read; pushing the adapter needs another token"
    return access(f"the token is {account.name}'s and {may}", user=account.name, can_push=account.can_write)


def disk_needed(num_trainable: int, moment_bytes: int) -> int:
    """Return the most bytes on disk during a run."""
    return total(disk_items(num_trainable, moment_bytes))


def check_room(output: Path, parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> None:
    """Check that the first checkpoints can be written. Raises StorageFull: better now than after hours."""
    needed = disk_needed(sum(parameter.numel() for parameter in parameters), recipe.train.moment_bytes)
    if problems := list(_room(output, needed, "the run and its checkpoints")):
        raise StorageFull(problems[0])


def disk_problems(output: Path, needed: int, base: StoredBase, num_weights: int) -> Iterator[str]:
    """Yield a problem when the output, or the weights (bf16) of a base that is not here yet, do not fit on disk."""
    yield from _room(output, needed, "the run and its checkpoints")
    if base.ref.fingerprint is None:
        yield from _room(home(), 2 * num_weights, f"the weights of {base.ref.id}")


def memory_problems(least: float, device: str) -> Iterator[str]:
    """Yield a problem when `least` bytes are more than the machine or the GPU has in all."""
    have = _memory_of(device)
    if least > have:
        yield (
            f"memory: at least {format_bytes(least)} are needed and {device} has {format_bytes(have)}: lower "
            "batch_size and raise gradient_accumulation (the result is the same), lower max_length, or divide the base "
            "among devices (--launch N --shard)."
        )


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk that `path` is, or will be, on."""
    absolute = path.absolute()
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _room(path: Path, needed: int, what: str) -> Iterator[str]:
    free = free_bytes(path)
    if needed > free:
        yield (
            f"disk: {what} need up to {format_bytes(needed)} at {path} and {format_bytes(free)} are free: free some "
            "space, or use another disk."
        )


def _memory_of(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
