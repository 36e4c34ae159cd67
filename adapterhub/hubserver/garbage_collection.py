"""Garbage collection: delete the objects, commits and xorbs of a hub that nothing refers to.

Safe while servers run: a file that was written or used within the grace period is not deleted, and each use of a file
resets its age.
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
from adapterhub.hubserver.errors import RepoNotFound
from adapterhub.hubserver.storage.discussion_store import DiscussionStore
from adapterhub.hubserver.storage.pages import pages_of
from adapterhub.hubserver.storage.store import GC_LOCK, HubStore, Repo
from adapterhub.hubserver.xet.xorb_store import XorbStore

DEFAULT_GRACE_S = 24 * 3600


@dataclass(frozen=True)
class Deleted:
    """What a garbage collection deleted."""

    num_objects: int
    num_commits: int
    freed_bytes: int


class GarbageCollector:
    """One garbage collection of a hub's folder.

    `grace_s`: files that were written or used within this time are not deleted, in seconds. Beside a running server it
    must not be less than UPLOAD_LIFETIME_S, because the commit comes after the upload.
    """

    def __init__(self, root: Path, *, grace_s: float = DEFAULT_GRACE_S) -> None:
        self._store = HubStore(root)
        self._discussions = DiscussionStore(self._store)
        self._xet = XorbStore(root, self._store.objects)
        self._trash, self._locks = root / "trash", root / "locks"
        self._oldest_s = time.time() - grace_s
        self._grace_s = grace_s

    def gc(self) -> Deleted:
        """Delete what was not used within the grace period. Wait for a collection in another process to end first."""
        with FileLock(self._locks / GC_LOCK):
            return self._gc()

    def _gc(self) -> Deleted:
        for left in self._trash.iterdir():
            # Left by a process that was killed. A young one may be a repository that is being created.
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < self._oldest_s:
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        self._remove_incomplete_repos()
        self._store.objects.remove_stale_uploads(older_than_s=max(self._grace_s, UPLOAD_LIFETIME_S))
        used_blobs: set[str] = set()
        used_lfs: set[str] = set()
        seen: set[str] = set()
        commits = 0
        # Repeat until there is no new one: a repository may be moved at the same time.
        while new := [repo for repo in self._repos() if repo.id not in seen]:
            for repo in new:
                seen.add(repo.id)
                with contextlib.suppress(RepoNotFound):
                    commits += self._gc_repo(repo, used_blobs, used_lfs)
        sizes = [
            *self._delete_unused(self._store.objects.git_folder, keep=used_blobs),
            *self._delete_unused(self._store.objects.lfs_folder, keep=used_lfs),
        ]
        return Deleted(len(sizes), commits, sum(sizes) + self._xet.remove_unused())

    def _remove_incomplete_repos(self) -> None:
        """Delete folders without `repo.json`: adapterhub 0.1 left them when duplicating a repository failed."""
        for folder, repo_id in self._store.incomplete_repos():
            with self._store.locked(repo_id):
                if not (folder / "repo.json").exists() and folder.stat().st_mtime < self._oldest_s:
                    self._store.remove_incomplete(folder)

    def _repos(self) -> list[Repo]:
        return [*self._store.repos("model"), *self._store.repos("dataset")]

    def _gc_repo(self, repo: Repo, used_blobs: set[str], used_lfs: set[str]) -> int:
        """Delete the commits and markers that no ref reaches; add what the others use to the two sets.

        Return the number of commits deleted.
        """
        with self._store.locked(repo.repo_id):
            repo = self._store.repo(repo.repo_id)
            folder = self._store.folder(repo.repo_id)
            reached = self._reached(repo)
            removed = sum(
                self._delete_if_old(record) is not None
                for record in (folder / "commits").iterdir()
                if record.stem not in reached
            )
            used_lfs_here: set[str] = set()
            pages: set[str] = set()
            for record in (folder / "commits").glob("*.json"):
                for page_id, entries in pages_of(self._store.commit_at(repo, record.stem)):
                    # Most pages are those of the commit before.
                    if page_id not in pages:
                        pages.add(page_id)
                        used_blobs.update(entry.blob for entry in entries.values() if entry.sha256 is None)
                        used_lfs_here.update(entry.sha256 for entry in entries.values() if entry.sha256 is not None)
            if (folder / "pages").is_dir():
                for page in (folder / "pages").iterdir():
                    if page.stem not in pages:
                        self._delete_if_old(page)
            for mark in (folder / "lfs").glob("*"):
                if mark.name in used_lfs_here or self._delete_if_old(mark) is None:
                    used_lfs.add(mark.name)
        return removed

    def _reached(self, repo: Repo) -> set[str]:
        """Return the ids of all commits that a branch, a tag, a pull request or a young commit reaches.

        A young commit may become a branch again, and then needs its ancestors.
        """
        pulls = [one for one in self._discussions.all(repo) if one.is_pull]
        starts = {*repo.branches.values(), *repo.tags.values(), *repo.merged.values()}
        starts |= {sha for pull in pulls for sha in (pull.start, pull.head) if sha is not None}
        for record in (self._store.folder(repo.repo_id) / "commits").glob("*.json"):
            if record.stat().st_mtime >= self._oldest_s:
                starts.add(record.stem)
        return {commit.sha for commit in self._store.reached(repo, starts)}

    def _delete_unused(self, folder: Path, *, keep: set[str]) -> Iterator[int]:
        """Delete old files that are not in `keep`. Yield the size of each, in bytes."""
        for path in folder.iterdir():
            if path.name not in keep:
                size = self._delete_if_old(path)
                if size is not None:
                    yield size

    def _delete_if_old(self, path: Path) -> int | None:
        """Delete a file if it is older than the grace period. Return its size in bytes, or None if it is not."""
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime >= self._oldest_s:
                return None
            trash = self._trash / secrets.token_hex(8)
            path.rename(trash)
            status = trash.stat()
            # Its age was reset between the check and the rename: move it back.
            if status.st_mtime >= self._oldest_s:
                trash.rename(path)
                return None
            trash.unlink()
            return status.st_size
        return None
