"""Removing what nothing needs any more: objects, marks, commits, chunks. Knows no users and no HTTP.

Safe beside running servers: what is young stays, using a thing makes it young, and only what no branch, tag or pull
request reaches is old.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from adapterhub.hubserver.auth.tickets import UPLOAD_LIFETIME_S
from adapterhub.hubserver.errors import RepoMissing, RevisionMissing
from adapterhub.hubserver.storage.discussions import Discussions
from adapterhub.hubserver.storage.store import HubStore, Repo
from adapterhub.hubserver.xet.store import XetStore

DEFAULT_GRACE_S = 24 * 3600
MIN_GRACE_S = UPLOAD_LIFETIME_S
"""An upload may take that long, and its commit comes last."""


@dataclass(frozen=True)
class Swept:
    """What was removed."""

    objects: int
    commits: int
    freed_bytes: int


class Sweeper:
    """One pass over a hub's folder."""

    def __init__(self, root: Path, *, grace_s: float = DEFAULT_GRACE_S) -> None:
        self._store = HubStore(root)
        self._discussions = Discussions(self._store)
        self._xet = XetStore(root, self._store.objects)
        self._trash, self._locks = root / "trash", root / "locks"
        self._limit = time.time() - grace_s
        self._grace_s = grace_s

    def sweep(self) -> Swept:
        """Remove what is unused for longer than the grace period. Waits for a pass that goes on elsewhere."""
        with FileLock(self._locks / "gc.lock"):
            return self._sweep()

    def _sweep(self) -> Swept:
        for left in self._trash.iterdir():
            # Of a process that was killed while it deleted.
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        self._store.objects.sweep_uploads(older_than_s=max(self._grace_s, UPLOAD_LIFETIME_S))
        used_blobs: set[str] = set()
        used_lfs: set[str] = set()
        seen: set[str] = set()
        commits = 0
        # Again until there is none we have not seen: one may be moved while we look.
        while new := [repo for repo in self._repos() if repo.id not in seen]:
            for repo in new:
                seen.add(repo.id)
                with contextlib.suppress(RepoMissing):
                    commits += self._sweep_repo(repo, used_blobs, used_lfs)
        sizes = [
            *self._sweep_folder(self._store.objects.git_folder, keep=used_blobs),
            *self._sweep_folder(self._store.objects.lfs_folder, keep=used_lfs),
        ]
        return Swept(len(sizes), commits, sum(sizes) + self._xet.sweep())

    def _repos(self) -> list[Repo]:
        return [*self._store.repos("model"), *self._store.repos("dataset")]

    def _sweep_repo(self, repo: Repo, used_blobs: set[str], used_lfs: set[str]) -> int:
        """Note what the repository uses; remove commits and marks that no ref reaches. Returns the commits removed."""
        with self._store.locked(repo.repo_id):
            repo = self._store.repo(repo.repo_id)
            reached = self._reached(repo)
            removed = 0
            for record in (self._store.folder(repo.repo_id) / "commits").glob("*.json"):
                if record.stem not in reached and self._retire(record) is not None:
                    removed += 1
            kept = set()
            for record in (self._store.folder(repo.repo_id) / "commits").glob("*.json"):
                for entry in self._store.commit_at(repo, record.stem).files.values():
                    if entry.sha256 is None:
                        used_blobs.add(entry.blob)
                    else:
                        kept.add(entry.sha256)
            for mark in (self._store.folder(repo.repo_id) / "lfs").glob("*"):
                if mark.name in kept or self._retire(mark) is None:
                    used_lfs.add(mark.name)
        return removed

    def _reached(self, repo: Repo) -> set[str]:
        """Ids of all commits that a branch, a tag or a pull request leads to."""
        pulls = [one for one in self._discussions.all(repo) if one.is_pull]
        starts = {*repo.branches.values(), *repo.tags.values(), *repo.merged.values()}
        starts |= {sha for pull in pulls for sha in (pull.start, pull.head) if sha is not None}
        reached: set[str] = set()
        for start in starts:
            with contextlib.suppress(RevisionMissing):
                for commit in self._store.history(repo, start):
                    if commit.sha in reached:
                        break
                    reached.add(commit.sha)
        return reached

    def _sweep_folder(self, folder: Path, *, keep: set[str]) -> Iterator[int]:
        """Remove old files that are not to be kept; yields the bytes of each."""
        for path in folder.iterdir():
            if path.name not in keep:
                size = self._retire(path)
                if size is not None:
                    yield size

    def _retire(self, path: Path) -> int | None:
        """Remove a file if it is old; its bytes, or None when it stays."""
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime >= self._limit:
                return None
            trash = self._trash / secrets.token_hex(8)
            path.rename(trash)
            status = trash.stat()
            # Somebody began to use it between the look and the rename: it goes back where it was.
            if status.st_mtime >= self._limit:
                trash.rename(path)
                return None
            trash.unlink()
            return status.st_size
        return None
