"""Repositories on disk: refs, commits and who has shown which large object. Knows no users' rights and no HTTP.

Below the root: `objects/` (bytes), `repos/<namespace>/<name>/` (data sets: `datasets/...`) with `repo.json` (the refs,
written last), `commits/<sha>.json`, `discussions/<n>.json` and `lfs/<sha256>` (empty marks), `locks/`, and `uploads/`
and `trash/` for what is under way.
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
from adapterhub.hubserver.errors import (
    AlreadyExists,
    Refusal,
    RepoMissing,
    RevisionMissing,
    StaleParent,
    StoreBusy,
    UploadMismatch,
)
from adapterhub.hubserver.names import Kind, RepoId, check_ref, is_commit_sha, pull_number
from adapterhub.hubserver.storage.commits import Change, Commit, FileEntry, NewCommit, files_after
from adapterhub.hubserver.storage.discussion import Discussion
from adapterhub.hubserver.storage.git_ids import blob_id, lfs_pointer
from adapterhub.hubserver.storage.objects import ObjectStore, touched

DEFAULT_BRANCH = "main"
RefKind = Literal["branches", "tags"]
_LOCK_TIMEOUT_S = 30.0


Gate = Literal["auto", "manual"]
AccessStatus = Literal["pending", "accepted", "rejected"]


class AccessRequest(BaseModel):
    """What became of somebody's wish to have the files of a gated repository."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: AccessStatus
    time_s: int
    """seconds since 1970"""


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
    gated: Gate | None = None
    """its files are for those who asked: who asks gets them ('auto'), or an owner decides ('manual')"""
    access: dict[str, AccessRequest] = {}
    """user -> what became of the wish"""
    merged: dict[int, str] = {}
    """number of a pull request -> the commit it became; written together with the branch"""
    blob_bytes: int = 0
    """of all small files that were ever committed, for quotas"""

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

    def grown(self, head: Commit, commit: Commit) -> Repo:
        """With the small files counted that a commit brought."""
        added = sum(e.size for p, e in commit.files.items() if e.sha256 is None and head.files.get(p) != e)
        return self.model_copy(update={"blob_bytes": self.blob_bytes + added})

    def missing(self, revision: str) -> RevisionMissing:
        known = ", ".join([*self.branches, *self.tags][:10])
        return RevisionMissing(f"{self.id} has no revision {revision!r}; it has {known}.")


class HubStore:
    """All repositories below one folder; several processes may use the same folder at once."""

    def __init__(self, root: Path) -> None:
        self.objects = ObjectStore(root)
        self._repos = {"model": root / "repos", "dataset": root / "datasets"}
        self._locks = root / "locks"
        self._trash = root / "trash"
        for folder in (*self._repos.values(), self._locks, self._trash):
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
        with self.locked(repo_id):
            if (self.folder(repo_id) / "repo.json").exists():
                raise AlreadyExists(f"the repository {repo_id} exists already.")
            (self.folder(repo_id) / "lfs").mkdir(parents=True, exist_ok=True)
            self.save_commit(repo_id, first)
            self.save(repo)
        return repo

    def delete_repo(self, repo_id: RepoId) -> None:
        """Remove a repository; the objects stay. Raises RepoMissing."""
        with self.locked(repo_id):
            self.repo(repo_id)
            trash = self._trash / secrets.token_hex(8)
            self.folder(repo_id).rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def repo(self, repo_id: RepoId) -> Repo:
        """The repository as it is now. Raises RepoMissing."""
        try:
            repo = Repo.model_validate_json((self.folder(repo_id) / "repo.json").read_bytes())
        except FileNotFoundError:
            raise RepoMissing(f"no repository {repo_id} here.") from None
        # The folder says the name: moving a repository is one rename.
        return repo.model_copy(update={"id": str(repo_id)})

    def repos(self, kind: Kind, namespace: str = "*") -> Iterator[Repo]:
        """All repositories of a kind, or those of one owner, by name."""
        for record in sorted(self._repos[kind].glob(f"{namespace}/*/repo.json")):
            # Somebody may delete one while we look.
            with contextlib.suppress(RepoMissing):
                yield self.repo(RepoId(record.parent.parent.name, record.parent.name, kind))

    def move_repo(self, source: RepoId, target: RepoId) -> None:
        """Give it another name or owner. Raises RepoMissing, AlreadyExists."""
        with self._both_locked(source, target):
            self.repo(source)
            self.folder(target).parent.mkdir(parents=True, exist_ok=True)
            self.folder(source).rename(self.folder(target))

    def duplicate_repo(self, source: RepoId, target: RepoId, *, private: bool) -> None:
        """Copy a repository with its history and its gate, without its discussions and whom it let in.

        Raises RepoMissing, AlreadyExists.
        """
        with self._both_locked(source, target):
            copy = self.repo(source).model_copy(
                update={"id": str(target), "private": private, "created_s": int(time.time())}
                | {"access": {}, "merged": {}}
            )
            self.folder(target).mkdir(parents=True, exist_ok=True)
            for part in ("commits", "lfs"):
                shutil.copytree(self.folder(source) / part, self.folder(target) / part, dirs_exist_ok=True)
            self.save(copy)

    def change(self, repo_id: RepoId, **changes: object) -> None:
        """Set fields of the repository's record: `private`, `gated`. Raises RepoMissing."""
        with self.locked(repo_id):
            self.save(self.repo(repo_id).model_copy(update=changes))

    def set_access(self, repo_id: RepoId, user: str, *, status: AccessStatus) -> None:
        """Note what became of somebody's wish to have the files. Raises RepoMissing."""
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            request = AccessRequest(status=status, time_s=int(time.time()))
            self.save(repo.model_copy(update={"access": {**repo.access, user: request}}))

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        """The commit a revision names. Raises RevisionMissing."""
        path = self._commit_path(repo.repo_id, self._sha_of(repo, revision))
        try:
            # Asked each time: the record may be remembered from a repository of this name that was deleted.
            path.stat()
            return self._read_commit(path)
        except FileNotFoundError:
            raise repo.missing(revision) from None

    def _sha_of(self, repo: Repo, revision: str) -> str:
        number = pull_number(revision)
        if number is None:
            return repo.sha_of(revision)
        try:
            record = self.folder(repo.repo_id) / "discussions" / f"{number}.json"
            head = Discussion.model_validate_json(record.read_bytes()).head
        except FileNotFoundError:
            raise repo.missing(revision) from None
        if head is None:
            raise repo.missing(revision)
        return head

    def history(self, repo: Repo, revision: str) -> Iterator[Commit]:
        """The commit and its ancestors, newest first. Raises RevisionMissing."""
        commit = self.commit_at(repo, revision)
        yield commit
        while commit.parents:
            commit = self.commit_at(repo, commit.parents[0])
            yield commit

    def commit(self, repo_id: RepoId, branch: str, *, changes: Iterable[Change], new: NewCommit) -> Commit:
        """Add a commit to a branch; when nothing changes, return the head as it is.

        Raises StaleParent, RepoMissing, RevisionMissing, BadName and EntryMissing.
        """
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            if branch not in repo.branches:
                raise repo.missing(branch)
            head = self.commit_at(repo, f"refs/heads/{branch}")
            commit = self.add_commit(repo, head, changes=changes, new=new)
            if commit != head:
                branches = {**repo.branches, branch: commit.sha}
                self.save(repo.grown(head, commit).model_copy(update={"branches": branches}))
        return commit

    def add_commit(self, repo: Repo, head: Commit, *, changes: Iterable[Change], new: NewCommit) -> Commit:
        """Write the commit after `head`, which no ref names yet; `head` itself when nothing changes.

        The caller holds the lock. Raises StaleParent, BadName and EntryMissing.
        """
        if new.parent is not None and not head.sha.startswith(new.parent.lower()):
            raise StaleParent(
                f"{repo.id} is at {head.sha}, not at the expected parent {new.parent}: somebody committed first. "
                "Look at their change and try again."
            )
        files = files_after(head, changes)
        if files == head.files:
            return head
        commit = Commit.create(
            files,
            (head.sha,),
            author=new.author,
            title=new.title,
            description=new.description,
            time_s=int(time.time()),
        )
        self.save_commit(repo.repo_id, commit)
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
        """Whether the object's bytes were uploaded to this very repository; mark and object count as young again.

        Objects are shared on disk, but knowing a sha256 must not be enough to read another repository's file.
        """
        return touched(self._lfs_mark(repo_id, sha256)) and self.objects.touch_lfs(sha256)

    def can_read(self, repo_id: RepoId, entry: FileEntry) -> bool:
        """Whether the bytes of a file may be had from this repository."""
        return entry.sha256 is None or self._lfs_mark(repo_id, entry.sha256).exists()

    def lfs_marks(self, repo_id: RepoId) -> dict[str, tuple[int, float]]:
        """sha256 of every object uploaded to this repository -> its bytes, and when it was last sent or asked for.

        The time is in seconds since 1970.
        """
        found = {}
        for mark in (self.folder(repo_id) / "lfs").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found[mark.name] = (self.objects.lfs_path(mark.name).stat().st_size, mark.stat().st_mtime)
        return found

    def drop_lfs(self, repo_id: RepoId, sha256: str) -> None:
        """Forget that the object was uploaded here; it cannot be read from this repository any more."""
        self._lfs_mark(repo_id, sha256).unlink(missing_ok=True)

    def stored_bytes(self, repo: Repo) -> int:
        """What a quota counts: large objects once each, and every small file ever committed."""
        return repo.blob_bytes + sum(size for size, _ in self.lfs_marks(repo.repo_id).values())

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
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            refs = repo.refs(kind)
            if check_ref(name) in refs:
                raise AlreadyExists(f"{repo_id} already has '{name}' among its {kind}, at {refs[name]}.")
            sha = self.commit_at(repo, target).sha
            self.save(repo.model_copy(update={kind: {**refs, name: sha}}))

    def _drop_ref(self, repo_id: RepoId, kind: RefKind, *, name: str) -> None:
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            refs = repo.refs(kind)
            if name not in refs:
                raise repo.missing(name)
            left = {ref: sha for ref, sha in refs.items() if ref != name}
            self.save(repo.model_copy(update={kind: left}))

    @contextlib.contextmanager
    def locked(self, repo_id: RepoId) -> Iterator[None]:
        """One writer per repository, over all processes. The lock outlives the repository's folder."""
        path = self._locks / f"{repo_id}.lock"
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

    @contextlib.contextmanager
    def _both_locked(self, source: RepoId, target: RepoId) -> Iterator[None]:
        """For what makes `target` out of `source`. Raises AlreadyExists."""
        # Always in the same order, or two who swap names would wait for each other.
        first, second = sorted((source, target), key=str)
        with self.locked(first), self.locked(second) if first != second else contextlib.nullcontext():
            if (self.folder(target) / "repo.json").exists():
                raise AlreadyExists(f"the repository {target} exists already.")
            yield

    def folder(self, repo_id: RepoId) -> Path:
        """Where everything of a repository but its objects lies."""
        return self._repos[repo_id.kind] / repo_id.namespace / repo_id.name

    def _commit_path(self, repo_id: RepoId, sha: str) -> Path:
        return self.folder(repo_id) / "commits" / f"{sha}.json"

    def _lfs_mark(self, repo_id: RepoId, sha256: str) -> Path:
        return self.folder(repo_id) / "lfs" / sha256

    def save(self, repo: Repo) -> None:
        """Write the refs and settings; the caller holds the lock."""
        write_atomic(self.folder(repo.repo_id) / "repo.json", repo.model_dump_json(indent=1))

    def save_commit(self, repo_id: RepoId, commit: Commit) -> None:
        """Write a commit that no ref names yet."""
        write_atomic(self._commit_path(repo_id, commit.sha), commit.model_dump_json())


def _read_commit(path: Path) -> Commit:
    return Commit.model_validate_json(path.read_bytes())
