"""How much may be kept, and whether more fits. Knows no routes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import StorageFull
from adapterhub.hubserver.errors import QuotaExceeded
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.store import HubStore, Repo

PART_BYTES = 256 << 20


@dataclass(frozen=True)
class Limits:
    """What a hub is set to keep; None: no limit."""

    repo_bytes: int | None = None
    owner_bytes: int | None = None
    """of all repositories below one name"""
    free_bytes: int = 256 << 20
    """what uploads leave free on the disk"""
    part_bytes: int = PART_BYTES
    """larger objects may be sent by LFS in parts of this size"""


class Quotas:
    """Asks before bytes are taken in."""

    def __init__(self, store: HubStore, root: Path, limits: Limits) -> None:
        self._store, self._root = store, root
        self.limits = limits

    def check(self, repo_id: RepoId, *, added_bytes: int) -> None:
        """Both of the below."""
        self.check_disk(coming_bytes=added_bytes)
        self.check_kept(repo_id, added_bytes=added_bytes)

    def check_disk(self, *, coming_bytes: int) -> None:
        """Raises StorageFull when the disk would have less than `free_bytes` left."""
        free = shutil.disk_usage(self._root).free
        if coming_bytes + self.limits.free_bytes > free:
            raise StorageFull(
                f"the hub's disk has {free / 1e6:.0f} MB free and keeps {self.limits.free_bytes / 1e6:.0f} MB of them: "
                f"{coming_bytes / 1e6:.0f} MB do not fit. Free some space (adapterhub hub gc)."
            )

    def check_kept(self, repo_id: RepoId, *, added_bytes: int) -> None:
        """Raises QuotaExceeded, whether the bytes are on the disk yet or not."""
        if self.limits.repo_bytes is not None:
            _check(
                str(repo_id), self._store.stored_bytes(self._store.repo(repo_id)), added_bytes, self.limits.repo_bytes
            )
        if self.limits.owner_bytes is not None:
            stored = sum(self._store.stored_bytes(repo) for repo in self._of_owner(repo_id.namespace))
            _check(f"{repo_id.namespace}/", stored, added_bytes, self.limits.owner_bytes)

    def _of_owner(self, namespace: str) -> list[Repo]:
        return [*self._store.repos("model", namespace), *self._store.repos("dataset", namespace)]


def _check(whose: str, stored: int, added: int, limit: int) -> None:
    if stored + added > limit:
        raise QuotaExceeded(
            f"{whose} holds {stored / 1e6:.1f} MB of its {limit / 1e6:.1f} MB; {added / 1e6:.1f} MB more do not fit. "
            "Delete files for good (permanently_delete_lfs_files), or ask whoever runs the hub for more."
        )
