"""Repositories on disk: refs, settings, commits, and the large objects that were uploaded to each.

Below the root: `objects/` (file contents), `repos/<namespace>/<name>/` (data sets: `datasets/...`) with `repo.json`
(refs and settings, written last), `commits/<sha>.json`, `pages/<sha256>.json` (the files of commits),
`discussions/<n>.json` and `lfs/<sha256>` (empty marker files), `locks/`, `uploads/` and `trash/`.

What a method confirmed is on disk when it returns: content before its names, `repo.json` last. A new
repository is built in `trash/` and renamed, so that nobody sees a part of one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import Field

from adapterhub.files import make_folder, sync, sync_tree, write_atomic
from adapterhub.hubserver.errors import (
    AlreadyExists,
    HubServerError,
    RepoNotFound,
    RevisionNotFound,
    StaleParent,
    StoreBusy,
    UploadMismatch,
)
from adapterhub.hubserver.names import Kind, RepoId, check_ref, is_commit_sha, pull_number
from adapterhub.hubserver.storage.commit import Change, NewCommit, RepoCommit, RepoFile, files_after
from adapterhub.hubserver.storage.commit_records import CommitRecords, commit_path, page_path
from adapterhub.hubserver.storage.discussion import Discussion
from adapterhub.hubserver.storage.git_ids import blob_id, lfs_pointer
from adapterhub.hubserver.storage.objects import ObjectStore, touch_if_exists
from adapterhub.hubserver.storage.pages import PagedFiles, pages_of
from adapterhub.strict import Strict
from adapterhub.units import format_duration

DEFAULT_BRANCH = "main"
GC_LOCK = ".gc.lock"
"""Name of the lock of garbage collections: no owner can have it."""
RefKind = Literal["branches", "tags"]
_LOCK_TIMEOUT_S = 30.0


Gate = Literal["auto", "manual"]
AccessStatus = Literal["pending", "accepted", "rejected"]


class AccessRequest(Strict):
    """A user's request for access to a gated repository, and its status."""

    status: AccessStatus
    time_s: int
    """Time of the last change of the status, in seconds since 1970."""


class Repo(Strict):
    """The contents of `repo.json`: a repository's refs and settings at one moment."""

    id: str
    private: bool
    created_s: int
    """Creation time, in seconds since 1970."""
    branches: dict[str, str]
    """Commit id of each branch."""
    tags: dict[str, str]
    """Commit id of each tag."""
    gated: Gate | None = None
    """How access to the files is granted: on request ('auto'), by the owner ('manual'), or to everyone (None)."""
    access: dict[str, AccessRequest] = Field(default_factory=dict)
    """Access request of each user."""
    merged: dict[int, str] = Field(default_factory=dict)
    """Merge commit of each merged pull request; written together with the branch."""
    blob_bytes: int = 0
    """Size of all small files that were ever committed, and of the commits themselves, in bytes, for the quota."""

    @property
    def repo_id(self) -> RepoId:
        """The repository's id."""
        return RepoId.parse(self.id)

    def refs(self, kind: RefKind) -> dict[str, str]:
        """Return the branches or the tags, with their commit ids."""
        return self.branches if kind == "branches" else self.tags

    def sha_of(self, revision: str) -> str:
        """Return the commit id of a branch, a tag, `refs/heads/...`, `refs/tags/...` or a full commit id.

        Raises RevisionNotFound.
        """
        branch, tag = revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")
        if branch in self.branches:
            return self.branches[branch]
        if tag in self.tags:
            return self.tags[tag]
        if is_commit_sha(revision):
            return revision
        raise self.revision_not_found(revision)

    def revision_not_found(self, revision: str) -> RevisionNotFound:
        """Return the error for an unknown revision, which lists the known ones."""
        known = ", ".join([*self.branches, *self.tags][:10])
        return RevisionNotFound(f"{self.id} has no revision {revision!r}: expected one of {known}.")


class HubStore:
    """All repositories below one folder; several processes can use the same folder at the same time."""

    def __init__(self, root: Path) -> None:
        self.objects = ObjectStore(root)
        self._repos: dict[Kind, Path] = {"model": root / "repos", "dataset": root / "datasets"}
        self._locks = root / "locks"
        self._trash = root / "trash"
        for folder in (*self._repos.values(), self._locks, self._trash):
            make_folder(folder)
        # The lock of garbage collections in adapterhub 0.1, in whose place an owner may be.
        if (self._locks / "gc.lock").is_file():
            (self._locks / "gc.lock").unlink(missing_ok=True)
        self._commits = CommitRecords()

    def create_repo(self, repo_id: RepoId, *, author: str, private: bool = False) -> Repo:
        """Create a repository with one empty commit on `main`. Raises AlreadyExists."""
        first = RepoCommit.create({}, (), author=author, title="initial commit", time_s=int(time.time()))
        repo = Repo(
            id=str(repo_id),
            private=private,
            created_s=first.time_s,
            branches={DEFAULT_BRANCH: first.sha},
            tags={},
        )
        with self.locked(repo_id), self._new_folder(repo_id) as folder:
            self._commits.write(folder, first)
            _save(folder, repo)
        return repo

    @contextlib.contextmanager
    def _new_folder(self, repo_id: RepoId) -> Iterator[Path]:
        """Yield a folder that becomes the repository's when the block succeeds. The caller holds the lock.

        Raises AlreadyExists.
        """
        self._check_free(repo_id)
        new = self._trash / secrets.token_hex(8)
        for part in ("commits", "pages", "lfs"):
            (new / part).mkdir(parents=True)
        try:
            yield new
            sync_tree(new)
            self._rename(new, self.folder(repo_id))
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _rename(self, source: Path, target: Path) -> None:
        """Rename the folder of a repository to the name of one that does not exist."""
        make_folder(target.parent)
        self.remove_incomplete(target)
        source.rename(target)
        sync(target.parent)

    def remove_incomplete(self, folder: Path) -> None:
        """Delete what a duplicate of adapterhub 0.1 that failed left under the name of a repository."""
        if folder.is_dir():
            trash = self._trash / secrets.token_hex(8)
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def delete_repo(self, repo_id: RepoId) -> None:
        """Delete a repository; its objects remain until garbage collection. Raises RepoNotFound."""
        with self.locked(repo_id):
            self.repo(repo_id)
            trash = self._trash / secrets.token_hex(8)
            self.folder(repo_id).rename(trash)
            sync(self.folder(repo_id).parent)
        shutil.rmtree(trash, ignore_errors=True)

    def repo(self, repo_id: RepoId) -> Repo:
        """Return the current state of a repository. Raises RepoNotFound."""
        try:
            repo = Repo.model_validate_json((self.folder(repo_id) / "repo.json").read_bytes())
        except FileNotFoundError:
            raise RepoNotFound(f"no repository {repo_id} on this hub: check the name.") from None
        # The name is that of the folder, so that moving a repository is one rename.
        return repo.model_copy(update={"id": str(repo_id)})

    def repos(self, kind: Kind, namespace: str = "*") -> Iterator[Repo]:
        """Yield all repositories of a kind, or those of one owner, sorted by name."""
        for record in sorted(self._repos[kind].glob(f"{namespace}/*/repo.json")):
            # A repository may be deleted at the same time.
            with contextlib.suppress(RepoNotFound):
                yield self.repo(RepoId(record.parent.parent.name, record.parent.name, kind))

    def incomplete_repos(self) -> Iterator[tuple[Path, RepoId]]:
        """Yield the folders under names of repositories that hold none, and the names."""
        for kind, root in self._repos.items():
            for folder in root.glob("*/*"):
                if not (folder / "repo.json").exists():
                    yield folder, RepoId(folder.parent.name, folder.name, kind)

    def move_repo(self, source: RepoId, target: RepoId) -> None:
        """Change the name or owner of a repository. Raises RepoNotFound, AlreadyExists."""
        with self._both_locked(source, target):
            self.repo(source)
            self._rename(self.folder(source), self.folder(target))
            sync(self.folder(source).parent)

    def duplicate_repo(self, source: RepoId, target: RepoId, *, private: bool) -> None:
        """Copy what the branches and tags of a repository reach, and its settings.

        Discussions, access grants, and what was uploaded or committed but is reached no more are not copied. Raises
        RepoNotFound, AlreadyExists.
        """
        with self._both_locked(source, target), self._new_folder(target) as folder:
            original = self.repo(source)
            for commit in self.reached(original, [*original.branches.values(), *original.tags.values()]):
                self._copy_commit(self.folder(source), folder, commit)
            copy = original.model_copy(
                update={"id": str(target), "private": private, "created_s": int(time.time())}
                | {"access": {}, "merged": {}}
            )
            _save(folder, copy)

    def _copy_commit(self, source: Path, target: Path, commit: RepoCommit) -> None:
        # As links, because records never change.
        os.link(commit_path(source, commit.sha), commit_path(target, commit.sha))
        for page_id, entries in pages_of(commit):
            if isinstance(commit.files, PagedFiles):
                if page_path(target, page_id).exists():
                    continue
                os.link(page_path(source, page_id), page_path(target, page_id))
            for entry in entries.values():
                # Without the mark the file was permanently deleted.
                if entry.sha256 is not None and (source / "lfs" / entry.sha256).exists():
                    (target / "lfs" / entry.sha256).touch()

    def reached(self, repo: Repo, starts: Iterable[str]) -> Iterator[RepoCommit]:
        """Yield each commit that is in `starts` or an ancestor of one, once. Unknown ones are left out."""
        seen: set[str] = set()
        for start in starts:
            with contextlib.suppress(RevisionNotFound):
                for commit in self.history(repo, start):
                    if commit.sha in seen:
                        break
                    seen.add(commit.sha)
                    yield commit

    def change(self, repo_id: RepoId, **changes: object) -> None:
        """Change the settings `private` and `gated`. Raises RepoNotFound."""
        with self.locked(repo_id):
            self.save(self.repo(repo_id).model_copy(update=changes))

    def set_access(self, repo_id: RepoId, user: str, *, decide: Callable[[Repo], AccessStatus | None]) -> None:
        """Set the status of a user's access request to what `decide` returns for the repository as it is now.

        None changes nothing. Raises RepoNotFound, and whatever `decide` raises.
        """
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            status = decide(repo)
            if status is not None:
                request = AccessRequest(status=status, time_s=int(time.time()))
                self.save(repo.model_copy(update={"access": {**repo.access, user: request}}))

    def commit_at(self, repo: Repo, revision: str) -> RepoCommit:
        """Return the commit of a revision. Raises RevisionNotFound."""
        try:
            return self._commits.read(self.folder(repo.repo_id), self._sha_of(repo, revision))
        except FileNotFoundError:
            raise repo.revision_not_found(revision) from None

    def _sha_of(self, repo: Repo, revision: str) -> str:
        number = pull_number(revision)
        if number is None:
            return repo.sha_of(revision)
        try:
            record = self.folder(repo.repo_id) / "discussions" / f"{number}.json"
            head = Discussion.model_validate_json(record.read_bytes()).head
        except FileNotFoundError:
            raise repo.revision_not_found(revision) from None
        if head is None:
            raise repo.revision_not_found(revision)
        return head

    def history(self, repo: Repo, revision: str) -> Iterator[RepoCommit]:
        """Yield the commit of a revision and its ancestors, newest first. Raises RevisionNotFound."""
        commit = self.commit_at(repo, revision)
        yield commit
        while commit.parents:
            commit = self.commit_at(repo, commit.parents[0])
            yield commit

    def commit(self, repo_id: RepoId, branch: str, *, changes: Iterable[Change], new: NewCommit) -> RepoCommit:
        """Add a commit to a branch and return it; without changes, return the branch's current commit.

        Raises StaleParent, RepoNotFound, RevisionNotFound, InvalidName and EntryNotFound.
        """
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            if branch not in repo.branches:
                raise repo.revision_not_found(branch)
            head = self.commit_at(repo, f"refs/heads/{branch}")
            commit, repo = self.add_commit(repo, head, changes=changes, new=new)
            if commit != head:
                self.save(repo.model_copy(update={"branches": {**repo.branches, branch: commit.sha}}))
        return commit

    def add_commit(
        self, repo: Repo, head: RepoCommit, *, changes: Iterable[Change], new: NewCommit
    ) -> tuple[RepoCommit, Repo]:
        """Write the commit that follows `head`, without moving a ref; without changes, it is `head`.

        Return it, and the repository with its size added, which the caller saves. The caller holds the lock. Raises
        StaleParent, InvalidName, EntryNotFound, TooLarge, and UploadMismatch for a large object that was deleted.
        """
        if new.parent is not None and not head.sha.startswith(new.parent.lower()):
            raise StaleParent(
                f"{repo.id} is at commit {head.sha}: expected {new.parent}, because another commit came first. "
                "Review that commit and try again."
            )
        before, files = dict(head.files), files_after(head, changes)
        if files == before:
            return head, repo
        changed = [entry for path, entry in files.items() if before.get(path) != entry]
        self.check_objects(repo.repo_id, changed)
        commit = RepoCommit.create(
            files,
            (head.sha,),
            author=new.author,
            title=new.title,
            description=new.description,
            time_s=int(time.time()),
        )
        added = self.save_commit(repo.repo_id, commit)
        added += sum(entry.size for entry in changed if entry.sha256 is None)
        return commit, repo.model_copy(update={"blob_bytes": repo.blob_bytes + added})

    def check_objects(self, repo_id: RepoId, entries: Iterable[RepoFile]) -> None:
        """Check that the repository still has the large objects. Raises UploadMismatch."""
        gone = sorted({str(entry.sha256) for entry in entries if not self.can_read(repo_id, entry)})
        if gone:
            raise UploadMismatch(
                f"{repo_id} has {', '.join(gone[:3])} no longer: the object was permanently deleted. Upload it again."
            )

    def create_branch(self, repo_id: RepoId, branch: str, *, start: str) -> None:
        """Create a branch at a revision. Raises InvalidName, AlreadyExists, RevisionNotFound, RepoNotFound."""
        self._add_ref(repo_id, "branches", name=branch, target=start)

    def create_tag(self, repo_id: RepoId, tag: str, *, target: str) -> None:
        """Create a tag at a revision. Raises InvalidName, AlreadyExists, RevisionNotFound, RepoNotFound."""
        self._add_ref(repo_id, "tags", name=tag, target=target)

    def delete_branch(self, repo_id: RepoId, branch: str) -> None:
        """Delete a branch. Raises RevisionNotFound, RepoNotFound, and HubServerError for the default branch."""
        if branch == DEFAULT_BRANCH:
            raise HubServerError(f"the branch '{DEFAULT_BRANCH}' cannot be deleted: it is the default branch.")
        self._drop_ref(repo_id, "branches", name=branch)

    def delete_tag(self, repo_id: RepoId, tag: str) -> None:
        """Delete a tag. Raises RevisionNotFound, RepoNotFound."""
        self._drop_ref(repo_id, "tags", name=tag)

    def mark_lfs(self, repo_id: RepoId, sha256: str) -> None:
        """Record that an object was uploaded to a repository. Raises RepoNotFound."""
        self.objects.sync()
        mark = self._lfs_mark(repo_id, sha256)
        try:
            mark.touch()
            sync(mark.parent)
        except FileNotFoundError:
            raise RepoNotFound(f"no repository {repo_id} on this hub: check the name.") from None

    def has_lfs(self, repo_id: RepoId, sha256: str) -> bool:
        """Return whether an object was uploaded to this repository, and reset its age for garbage collection.

        Repositories share objects on disk, but to know a sha256 must not be enough to read another repository's file.
        """
        return touch_if_exists(self._lfs_mark(repo_id, sha256)) and self.objects.touch_lfs(sha256)

    def can_read(self, repo_id: RepoId, entry: RepoFile) -> bool:
        """Return whether the bytes of a file can be read from this repository."""
        return entry.sha256 is None or self._lfs_mark(repo_id, entry.sha256).exists()

    def lfs_marks(self, repo_id: RepoId) -> dict[str, tuple[int, float]]:
        """Return size and time of last use of every object uploaded to a repository, by sha256.

        Sizes are in bytes, times in seconds since 1970.
        """
        found = {}
        for mark in (self.folder(repo_id) / "lfs").glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found[mark.name] = (self.objects.lfs_path(mark.name).stat().st_size, mark.stat().st_mtime)
        return found

    def drop_lfs(self, repo_id: RepoId, sha256: str) -> None:
        """Remove an object from a repository, so that it cannot be read from it any more."""
        mark = self._lfs_mark(repo_id, sha256)
        mark.unlink(missing_ok=True)
        sync(mark.parent)

    def stored_bytes(self, repo: Repo) -> int:
        """Return the size that counts for quotas: each large object once, and every small file ever committed."""
        return repo.blob_bytes + sum(size for size, _ in self.lfs_marks(repo.repo_id).values())

    def lfs_entry(self, repo_id: RepoId, sha256: str) -> RepoFile:
        """Return the entry of an uploaded object. Raises UploadMismatch if it was not uploaded to this repository."""
        if not self.has_lfs(repo_id, sha256):
            raise UploadMismatch(f"the object {sha256} was never uploaded to {repo_id}: upload it, then commit.")
        size = self.objects.lfs_path(sha256).stat().st_size
        return RepoFile(blob=blob_id(lfs_pointer(sha256, size)), size=size, sha256=sha256)

    def path_of(self, entry: RepoFile) -> Path:
        """Return the path of a file's bytes."""
        if entry.sha256 is not None:
            return self.objects.lfs_path(entry.sha256)
        return self.objects.blob_path(entry.blob)

    def _add_ref(self, repo_id: RepoId, kind: RefKind, *, name: str, target: str) -> None:
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            refs = repo.refs(kind)
            if check_ref(name) in refs:
                raise AlreadyExists(f"{repo_id} already has '{name}' in its {kind}, at commit {refs[name]}.")
            sha = self.commit_at(repo, target).sha
            self.save(repo.model_copy(update={kind: {**refs, name: sha}}))

    def _drop_ref(self, repo_id: RepoId, kind: RefKind, *, name: str) -> None:
        with self.locked(repo_id):
            repo = self.repo(repo_id)
            refs = repo.refs(kind)
            if name not in refs:
                raise repo.revision_not_found(name)
            left = {ref: sha for ref, sha in refs.items() if ref != name}
            self.save(repo.model_copy(update={kind: left}))

    @contextlib.contextmanager
    def locked(self, repo_id: RepoId) -> Iterator[None]:
        """Hold the write lock of a repository, across all processes. Raises StoreBusy.

        The lock file is not in the repository's folder, which may be deleted or moved.
        """
        path = self._locks / f"{repo_id}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=_LOCK_TIMEOUT_S)
        try:
            lock.acquire()
        except Timeout:
            raise StoreBusy(
                f"{repo_id} was locked by other writers for {format_duration(_LOCK_TIMEOUT_S)}: try again."
            ) from None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _both_locked(self, source: RepoId, target: RepoId) -> Iterator[None]:
        """Hold the locks of a repository and of the name it is moved or copied to. Raises AlreadyExists."""
        # Always in the same order, so that two moves in opposite directions cannot deadlock.
        first, second = sorted((source, target), key=str)
        with self.locked(first), self.locked(second) if first != second else contextlib.nullcontext():
            self._check_free(target)
            yield

    def _check_free(self, repo_id: RepoId) -> None:
        if (self.folder(repo_id) / "repo.json").exists():
            raise AlreadyExists(f"the repository {repo_id} already exists: choose another name.")

    def folder(self, repo_id: RepoId) -> Path:
        """Return the folder of a repository; its objects are stored elsewhere."""
        return self._repos[repo_id.kind] / repo_id.namespace / repo_id.name

    def _lfs_mark(self, repo_id: RepoId, sha256: str) -> Path:
        return self.folder(repo_id) / "lfs" / sha256

    def save(self, repo: Repo) -> None:
        """Write the refs and settings of a repository. The caller holds the lock."""
        _save(self.folder(repo.repo_id), repo)

    def save_commit(self, repo_id: RepoId, commit: RepoCommit) -> int:
        """Write a commit, without moving a ref, after the files that it names. Return its size in bytes."""
        self.objects.sync()
        return self._commits.write(self.folder(repo_id), commit)


def _save(folder: Path, repo: Repo) -> None:
    write_atomic(folder / "repo.json", repo.model_dump_json(indent=1))
