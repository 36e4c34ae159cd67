"""History rewriting: squash a branch into one commit, remove large files from all commits."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.commit import RepoCommit
from adapterhub.hubserver.storage.store import HubStore, Repo


def squash(store: HubStore, repo_id: RepoId, branch: str, *, author: str, message: str) -> RepoCommit:
    """Replace the history of a branch by one commit without parents. Raises RevisionNotFound, RepoNotFound."""
    with store.locked(repo_id):
        repo = store.repo(repo_id)
        if branch not in repo.branches:
            raise repo.revision_not_found(branch)
        head = store.commit_at(repo, f"refs/heads/{branch}")
        only = RepoCommit.create(head.files, (), author=author, title=message, time_s=int(time.time()))
        store.save_commit(repo_id, only)
        store.save(repo.model_copy(update={"branches": {**repo.branches, branch: only.sha}}))
    return only


def remove_objects(store: HubStore, repo_id: RepoId, sha256s: Collection[str], *, is_rewriting: bool) -> None:
    """Permanently delete large objects from a repository.

    With `is_rewriting`, all commits are replaced by commits without these files. Raises RepoNotFound.
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
    """Return a function from a commit id to the id of the same commit without those objects."""
    known: dict[str, str] = {}

    def rewritten(sha: str) -> str:
        # Ids only: the files of all commits together may not fit into memory.
        chain = []
        for commit in store.history(repo, sha):
            if commit.sha in known:
                break
            chain.append(commit.sha)
        for old in reversed(chain):
            known[old] = _without(store, repo, store.commit_at(repo, old), sha256s, known).sha
        return known[sha]

    return rewritten


def _without(
    store: HubStore, repo: Repo, commit: RepoCommit, sha256s: frozenset[str], known: dict[str, str]
) -> RepoCommit:
    new = RepoCommit.create(
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
