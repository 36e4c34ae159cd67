"""Rewriting what was: a branch made one commit, large files removed from all commits. Knows no users and no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.commits import Commit
from adapterhub.hubserver.storage.store import HubStore, Repo


def squash(store: HubStore, repo_id: RepoId, branch: str, *, author: str, message: str) -> Commit:
    """Make a branch one commit without parents. Raises RevisionMissing, RepoMissing."""
    with store.locked(repo_id):
        repo = store.repo(repo_id)
        if branch not in repo.branches:
            raise repo.missing(branch)
        head = store.commit_at(repo, f"refs/heads/{branch}")
        only = Commit.create(head.files, (), author=author, title=message, time_s=int(time.time()))
        store.save_commit(repo_id, only)
        store.save(repo.model_copy(update={"branches": {**repo.branches, branch: only.sha}}))
    return only


def remove_objects(store: HubStore, repo_id: RepoId, sha256s: Collection[str], *, is_rewriting: bool) -> None:
    """Make large objects unreadable in a repository, for good; `is_rewriting`: as if no commit ever had them.

    Raises RepoMissing.
    """
    with store.locked(repo_id):
        repo = store.repo(repo_id)
        if is_rewriting:
            rewritten = _rewriter(store, repo, frozenset(sha256s))
            refs = {
                kind: {name: rewritten(sha) for name, sha in repo.refs(kind).items()} for kind in ("branches", "tags")
            }
            merged = {num: rewritten(sha) for num, sha in repo.merged.items()}
            store.save(repo.model_copy(update={**refs, "merged": merged}))
        for sha256 in sha256s:
            store.drop_lfs(repo_id, sha256)


def _rewriter(store: HubStore, repo: Repo, sha256s: frozenset[str]) -> Callable[[str], str]:
    """Commit id -> id of the same commit without those objects."""
    known: dict[str, str] = {}

    def rewritten(sha: str) -> str:
        line = []
        for commit in store.history(repo, sha):
            line.append(commit)
            if commit.sha in known:
                break
        for commit in reversed(line):
            known.setdefault(commit.sha, _without(store, repo, commit, sha256s, known).sha)
        return known[sha]

    return rewritten


def _without(store: HubStore, repo: Repo, commit: Commit, sha256s: frozenset[str], known: dict[str, str]) -> Commit:
    new = Commit.create(
        {path: entry for path, entry in commit.files.items() if entry.sha256 not in sha256s},
        tuple(known[parent] for parent in commit.parents),
        author=commit.author,
        title=commit.title,
        description=commit.description,
        time_s=commit.time_s,
    )
    if new.sha != commit.sha:
        store.save_commit(repo.repo_id, new)
    return new
