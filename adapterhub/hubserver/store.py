"""Repositories on disk: refs, commits and who has shown which large object. Knows no users' rights and no HTTP.

Below the root: `objects/` (bytes), `repos/<namespace>/<name>/` with `repo.json` (the refs, written last),
`commits/<sha>.json` and `lfs/<sha256>` (empty marks), `locks/`, and `uploads/` and `trash/` for what is under way.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from adapterhub.files import write_atomic
from adapterhub.hubserver.commits import Change, Commit, FileEntry, files_after
from adapterhub.hubserver.git_ids import blob_id, lfs_pointer
from adapterhub.hubserver.names import RepoId, check_ref, is_commit_sha
from adapterhub.hubserver.objects import ObjectStore
from adapterhub.hubserver.refusals import (
    AlreadyExists,
    Refusal,
    RepoMissing,
    RevisionMissing,
    StaleParent,
    StoreBusy,
    UploadMismatch,
)

DEFAULT_BRANCH = "main"
RefKind = Literal["branches", "tags"]
_LOCK_TIMEOUT_S = 30.0


class Repo(BaseModel):
    """What `repo.json` holds: a moment's view of a repository."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    private: bool
    created_s: int
    """seconds since 1970"""
    branches: dict[str, str]
    """name -> commit sha"""
    tags: dict[str, str]
    """name -> commit sha"""

    @property
    def repo_id(self) -> RepoId:
        return RepoId.parse(self.id)

    def refs(self, kind: RefKind) -> dict[str, str]:
        return self.branches if kind == "branches" else self.tags

    def sha_of(self, revision: str) -> str:
        """Commit of a branch, a tag, `refs/heads/...`, `refs/tags/...` or a full commit id. Raises RevisionMissing."""
        branch, tag = revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")
        if branch in self.branches:
            return self.branches[branch]
        if tag in self.tags:
            return self.tags[tag]
        if is_commit_sha(revision):
            return revision
        raise self.missing(revision)

    def missing(self, revision: str) -> RevisionMissing:
        known = ", ".join([*self.branches, *self.tags][:10])
        return RevisionMissing(f"{self.id} has no revision {revision!r}; it has {known}.")


class HubStore:
    """All repositories below one folder; several processes may use the same folder at once."""

    def __init__(self, root: Path) -> None:
        self.objects = ObjectStore(root)
        self._repos = root / "repos"
        self._locks = root / "locks"
        self._trash = root / "trash"
        for folder in (self._repos, self._locks, self._trash):
            folder.mkdir(parents=True, exist_ok=True)
        # A commit never changes, so its record can be kept once read.
        self._read_commit = lru_cache(maxsize=256)(_read_commit)

    def create_repo(self, repo_id: RepoId, *, author: str, private: bool = False) -> Repo:
        """Make a repository with one empty commit on `main`. Raises AlreadyExists."""
        first = Commit.create({}, (), author=author, title="initial commit", time_s=int(time.time()))
        repo = Repo(
            id=str(repo_id),
            private=private,
            created_s=first.time_s,
            branches={DEFAULT_BRANCH: first.sha},
            tags={},
        )
        with self._locked(repo_id):
            if (self._folder(repo_id) / "repo.json").exists():
                raise AlreadyExists(f"the repository {repo_id} exists already.")
            (self._folder(repo_id) / "lfs").mkdir(parents=True, exist_ok=True)
            self._save_commit(repo_id, first)
            self._save(repo)
        return repo

    def delete_repo(self, repo_id: RepoId) -> None:
        """Remove a repository; the objects stay. Raises RepoMissing."""
        with self._locked(repo_id):
            self.repo(repo_id)
            trash = self._trash / secrets.token_hex(8)
            self._folder(repo_id).rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def repo(self, repo_id: RepoId) -> Repo:
        """The repository as it is now. Raises RepoMissing."""
        try:
            return Repo.model_validate_json((self._folder(repo_id) / "repo.json").read_bytes())
        except FileNotFoundError:
            raise RepoMissing(f"no repository {repo_id} here.") from None

    def repos(self) -> Iterator[Repo]:
        """All repositories, by name."""
        for record in sorted(self._repos.glob("*/*/repo.json")):
            # Somebody may delete one while we look.
            with contextlib.suppress(RepoMissing):
                yield self.repo(RepoId(record.parent.parent.name, record.parent.name))

    def set_private(self, repo_id: RepoId, *, private: bool) -> None:
        """Change who sees it. Raises RepoMissing."""
        with self._locked(repo_id):
            self._save(self.repo(repo_id).model_copy(update={"private": private}))

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        """The commit a revision names. Raises RevisionMissing."""
        path = self._commit_path(repo.repo_id, repo.sha_of(revision))
        try:
            # Asked each time: the record may be remembered from a repository of this name that was deleted.
            path.stat()
            return self._read_commit(path)
        except FileNotFoundError:
            raise repo.missing(revision) from None

    def history(self, repo: Repo, revision: str) -> list[Commit]:
        """The commit and its ancestors, newest first. Raises RevisionMissing."""
        commits = [self.commit_at(repo, revision)]
        while commits[-1].parents:
            commits.append(self.commit_at(repo, commits[-1].parents[0]))
        return commits

    def commit(
        self,
        repo_id: RepoId,
        branch: str,
        *,
        changes: Iterable[Change],
        author: str,
        title: str,
        description: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Add a commit to a branch; when nothing changes, return the head as it is.

        `parent`: the (possibly shortened) commit the head must be, else StaleParent: compare and swap.
        Raises also RepoMissing, RevisionMissing, BadName and EntryMissing.
        """
        with self._locked(repo_id):
            repo = self.repo(repo_id)
            if branch not in repo.branches:
                raise repo.missing(branch)
            head = self.commit_at(repo, branch)
            if parent is not None and not head.sha.startswith(parent.lower()):
                raise StaleParent(
                    f"'{branch}' of {repo_id} is at {head.sha}, not at the expected parent {parent}: somebody "
                    "committed first. Look at their change and try again."
                )
            files = files_after(head, changes)
            if files == head.files:
                return head
            commit = Commit.create(
                files,
                (head.sha,),
                author=author,
                title=title,
                description=description,
                time_s=int(time.time()),
            )
            self._save_commit(repo_id, commit)
            self._save(repo.model_copy(update={"branches": {**repo.branches, branch: commit.sha}}))
        return commit

    def create_branch(self, repo_id: RepoId, branch: str, *, start: str) -> None:
        """Raises BadName, AlreadyExists, RevisionMissing, RepoMissing."""
        self._add_ref(repo_id, "branches", name=branch, target=start)

    def create_tag(self, repo_id: RepoId, tag: str, *, target: str) -> None:
        """Raises BadName, AlreadyExists, RevisionMissing, RepoMissing."""
        self._add_ref(repo_id, "tags", name=tag, target=target)

    def delete_branch(self, repo_id: RepoId, branch: str) -> None:
        """Raises RevisionMissing, RepoMissing, and Refusal for the default branch."""
        if branch == DEFAULT_BRANCH:
            raise Refusal(f"the branch '{DEFAULT_BRANCH}' cannot be deleted: every repository has it.")
        self._drop_ref(repo_id, "branches", name=branch)

    def delete_tag(self, repo_id: RepoId, tag: str) -> None:
        """Raises RevisionMissing, RepoMissing."""
        self._drop_ref(repo_id, "tags", name=tag)

    def mark_lfs(self, repo_id: RepoId, sha256: str) -> None:
        """Note that somebody uploaded this object's bytes to this repository. Raises RepoMissing."""
        try:
            self._lfs_mark(repo_id, sha256).touch()
        except FileNotFoundError:
            raise RepoMissing(f"no repository {repo_id} here.") from None

    def has_lfs(self, repo_id: RepoId, sha256: str) -> bool:
        """Whether the object's bytes were uploaded to this very repository.

        Objects are shared on disk, but knowing a sha256 must not be enough to read another repository's file.
        """
        return self._lfs_mark(repo_id, sha256).exists() and self.objects.lfs_path(sha256).exists()

    def lfs_entry(self, repo_id: RepoId, sha256: str) -> FileEntry:
        """The entry of an uploaded object. Raises UploadMismatch when it was never uploaded here."""
        if not self.has_lfs(repo_id, sha256):
            raise UploadMismatch(f"the object {sha256} was never uploaded to {repo_id}; upload it, then commit.")
        size = self.objects.lfs_path(sha256).stat().st_size
        return FileEntry(blob=blob_id(lfs_pointer(sha256, size)), size=size, sha256=sha256)

    def path_of(self, entry: FileEntry) -> Path:
        """Where the bytes of a file lie."""
        if entry.sha256 is not None:
            return self.objects.lfs_path(entry.sha256)
        return self.objects.blob_path(entry.blob)

    def _add_ref(self, repo_id: RepoId, kind: RefKind, *, name: str, target: str) -> None:
        with self._locked(repo_id):
            repo = self.repo(repo_id)
            refs = repo.refs(kind)
            if check_ref(name) in refs:
                raise AlreadyExists(f"{repo_id} already has '{name}' among its {kind}, at {refs[name]}.")
            sha = self.commit_at(repo, target).sha
            self._save(repo.model_copy(update={kind: {**refs, name: sha}}))

    def _drop_ref(self, repo_id: RepoId, kind: RefKind, *, name: str) -> None:
        with self._locked(repo_id):
            repo = self.repo(repo_id)
            refs = repo.refs(kind)
            if name not in refs:
                raise repo.missing(name)
            left = {ref: sha for ref, sha in refs.items() if ref != name}
            self._save(repo.model_copy(update={kind: left}))

    @contextlib.contextmanager
    def _locked(self, repo_id: RepoId) -> Iterator[None]:
        """One writer per repository, over all processes. The lock outlives the repository's folder."""
        path = self._locks / repo_id.namespace / f"{repo_id.name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=_LOCK_TIMEOUT_S)
        try:
            lock.acquire()
        except Timeout:
            raise StoreBusy(f"{repo_id} was busy for {_LOCK_TIMEOUT_S:.0f} s; try again.") from None
        try:
            yield
        finally:
            lock.release()

    def _folder(self, repo_id: RepoId) -> Path:
        return self._repos / repo_id.namespace / repo_id.name

    def _commit_path(self, repo_id: RepoId, sha: str) -> Path:
        return self._folder(repo_id) / "commits" / f"{sha}.json"

    def _lfs_mark(self, repo_id: RepoId, sha256: str) -> Path:
        return self._folder(repo_id) / "lfs" / sha256

    def _save(self, repo: Repo) -> None:
        write_atomic(self._folder(repo.repo_id) / "repo.json", repo.model_dump_json(indent=1))

    def _save_commit(self, repo_id: RepoId, commit: Commit) -> None:
        write_atomic(self._commit_path(repo_id, commit.sha), commit.model_dump_json())


def _read_commit(path: Path) -> Commit:
    return Commit.model_validate_json(path.read_bytes())
