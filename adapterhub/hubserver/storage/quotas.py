"""Storage limits: the quotas of repositories and owners, and the free disk space."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import StorageFull
from adapterhub.hubserver.errors import QuotaExceeded, RepoNotFound
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.store import HubStore, Repo
from adapterhub.units import format_bytes

PART_BYTES = 256 << 20


@dataclass(frozen=True)
class Limits:
    """The storage limits of a hub; None stands for no limit."""

    repo_bytes: int | None = None
    """Quota of one repository, in bytes."""
    owner_bytes: int | None = None
    """Quota of all repositories of one owner, in bytes."""
    free_bytes: int = 256 << 20
    """Disk space that uploads leave free, in bytes."""
    part_bytes: int = PART_BYTES
    """Part size of LFS uploads in parts, in bytes; smaller objects are sent as a whole."""


class Quotas:
    """Checks the limits of a hub before bytes are stored."""

    def __init__(self, store: HubStore, root: Path, limits: Limits) -> None:
        self._store, self._root = store, root
        self.limits = limits

    def check(self, repo_id: RepoId, *, added_bytes: int) -> None:
        """Check disk space and quotas. Raises StorageFull, QuotaExceeded."""
        self.check_disk(added_bytes=added_bytes)
        self.check_quota(repo_id, added_bytes=added_bytes)

    def check_disk(self, *, added_bytes: int) -> None:
        """Check that the disk has `free_bytes` left after the upload. Raises StorageFull."""
        free = shutil.disk_usage(self._root).free
        if added_bytes + self.limits.free_bytes > free:
            raise StorageFull(
                f"{format_bytes(added_bytes)} do not fit on the hub's disk: {format_bytes(free)} are free, of which "
                f"{format_bytes(self.limits.free_bytes)} are reserved. Free some space (adapterhub hub gc)."
            )

    def check_quota(self, repo_id: RepoId, *, added_bytes: int) -> None:
        """Check the quotas of the repository and its owner. Raises QuotaExceeded."""
        if self.limits.repo_bytes is not None:
            _check(str(repo_id), self._stored_bytes(repo_id), added_bytes, self.limits.repo_bytes)
        if self.limits.owner_bytes is not None:
            stored = sum(self._store.stored_bytes(repo) for repo in self._of_owner(repo_id.namespace))
            _check(f"{repo_id.namespace}/", stored, added_bytes, self.limits.owner_bytes)

    def _stored_bytes(self, repo_id: RepoId) -> int:
        try:
            return self._store.stored_bytes(self._store.repo(repo_id))
        except RepoNotFound:
            # The name to which a repository is to be moved or copied.
            return 0

    def _of_owner(self, namespace: str) -> list[Repo]:
        return [*self._store.repos("model", namespace), *self._store.repos("dataset", namespace)]


def _check(whose: str, stored: int, added: int, limit: int) -> None:
    if stored + added > limit:
        raise QuotaExceeded(
            f"{format_bytes(added)} do not fit: {whose} uses {format_bytes(stored)} of its {format_bytes(limit)}. "
            "Delete files permanently (permanently_delete_lfs_files), or ask the hub's administrator for more."
        )
