"""What can be known to stand in a run's way before it begins: disk, memory, the Hub's token. Computes no plan."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from adapterhub.adapter import StoredBase
from adapterhub.errors import HubError, NotAuthorized, StorageFull
from adapterhub.hub.client import Hub
from adapterhub.paths import home
from train.recipe import Recipe


class HubAccess(BaseModel):
    """What the Hub at hand says of the token at hand; nothing is asked without one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    endpoint: str
    user: str | None
    can_push: bool
    note: str
    problems: list[str] = []


def hub_access(hub: Hub | None = None) -> HubAccess:
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
        return access("no token; public bases can be pulled, to push the adapter set HF_TOKEN")
    may = "may push" if account.can_write else "may read, to push the adapter another token is needed"
    return access(f"the token is {account.name}'s and {may}", user=account.name, can_push=account.can_write)


def disk_needed(num_trainable: int, moment_bytes: int) -> int:
    """Bytes at most while a run goes on: while a checkpoint is written the one before is still there, and beside
    them the output and the best weights."""
    adapter = 4 * num_trainable
    return 2 * (adapter + moment_bytes * num_trainable) + 2 * adapter


def check_room(output: Path, parameters: Sequence[torch.nn.Parameter], recipe: Recipe) -> None:
    """Raises StorageFull when the first checkpoints could not be written: better now than after hours."""
    needed = disk_needed(sum(parameter.numel() for parameter in parameters), recipe.train.moment_bytes)
    if problems := list(_room(output, needed, "the run and its checkpoints")):
        raise StorageFull(problems[0])


def disk_problems(output: Path, needed: int, base: StoredBase, num_weights: int) -> Iterator[str]:
    """`needed` bytes at the output; and the weights (bf16) of a base that is not here yet, where bases are kept."""
    yield from _room(output, needed, "the run and its checkpoints")
    if base.ref.fingerprint is None:
        yield from _room(home(), 2 * num_weights, f"the weights of {base.ref.id}")


def memory_problems(least: float, device: str) -> Iterator[str]:
    """`least` bytes against all the machine or the GPU has."""
    have = _memory_of(device)
    if least > have:
        yield (
            f"memory: at least {_gb(least)} are needed and {device} has {_gb(have)}: lower batch_size and raise "
            "gradient_accumulation (the result is the same), lower max_length, or divide the base among devices "
            "(--launch N --shard)."
        )


def free_bytes(path: Path) -> int:
    """On the disk `path` is, or will be, on."""
    absolute = path.absolute()
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _room(path: Path, needed: int, what: str) -> Iterator[str]:
    free = free_bytes(path)
    if needed > free:
        yield (
            f"disk: {what} need up to {_gb(needed)} at {path} and {_gb(free)} are free: free some, or choose another "
            "place."
        )


def _memory_of(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
