"""The catalog of repositories: filters, sorting, pages, and the description of each repository."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adapterhub.hubserver.errors import RevisionNotFound
from adapterhub.hubserver.names import Kind
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.cards import ADAPTER_CONFIG_NAME, CARD_NAME, MAX_METADATA_BYTES, Facts, facts_of
from adapterhub.hubserver.storage.commit import RepoCommit, RepoFile
from adapterhub.hubserver.storage.sized_cache import SizedCache
from adapterhub.hubserver.storage.store import DEFAULT_BRANCH, HubStore, Repo

MAX_PAGE = 1000
_FACTS_CACHE_BYTES = 32 << 20
_BYTES_OF_FACTS = 2000
"""Size of the metadata of a repository without a card, in memory."""
_OBJECTS_PER_TEXT = 22
"""Size of parsed YAML and JSON in memory, relative to the text (measured: 4 to 22)."""


@dataclass(frozen=True)
class RepoQuery:
    """A query for models or data sets; a repository must meet every condition."""

    tags: tuple[str, ...] = ()
    author: str | None = None
    search: str | None = None
    """Part of `namespace/name`, in upper or lower case."""
    sort: str | None = None
    """`createdAt`; any other value sorts by last change. Newest first."""
    limit: int = MAX_PAGE
    skip: int = 0
    kind: Kind = "model"
    gated: bool | None = None


@dataclass(frozen=True)
class Page:
    """One page of the repositories that match a query."""

    models: tuple[tuple[Repo, RepoCommit], ...]
    next_skip: int | None
    """Offset of the next page; None on the last page."""


class RepoCatalog:
    """Lists the repositories of a store; caches their metadata by content."""

    def __init__(self, store: HubStore) -> None:
        self._store = store
        self._facts = SizedCache[Facts](_FACTS_CACHE_BYTES)

    def page(self, query: RepoQuery, *, can_see: Callable[[Repo], bool]) -> Page:
        """Return one page of the repositories that match."""
        found = [
            (repo, commit)
            for repo, commit, facts in self._heads(query.kind, lambda repo: can_see(repo) and _matches(repo, query))
            if set(query.tags) <= set(facts.tags)
        ]
        found.sort(key=lambda model: model[0].created_s if query.sort == "createdAt" else model[1].time_s, reverse=True)
        end = query.skip + query.limit
        return Page(tuple(found[query.skip : end]), end if end < len(found) else None)

    def model(self, repo: Repo, commit: RepoCommit, *, siblings: list[schemas.Sibling] | None = None) -> schemas.Model:
        """Return the description of a repository at a commit."""
        facts = self.facts_at(commit)
        bases = [schemas.BaseModelName(id=name) for name in facts.base_models]
        return schemas.Model(
            id=repo.repo_id.full_name,
            model_id=repo.repo_id.full_name,
            author=repo.repo_id.namespace,
            sha=commit.sha,
            private=repo.private,
            gated=repo.gated or False,
            created_at=schemas.iso_time(repo.created_s),
            last_modified=schemas.iso_time(commit.time_s),
            tags=list(facts.tags),
            library_name=facts.library_name,
            pipeline_tag=facts.pipeline_tag,
            card_data=facts.card or None,
            base_models=schemas.BaseModels(relation=facts.relation, models=bases) if facts.relation else None,
            config=_peft_config(facts),
            used_storage=commit.size_bytes,
            siblings=siblings,
        )

    def _heads(self, kind: Kind, is_asked: Callable[[Repo], bool]) -> Iterator[tuple[Repo, RepoCommit, Facts]]:
        for repo in filter(is_asked, self._store.repos(kind)):
            # A repository may be deleted at the same time.
            with contextlib.suppress(RevisionNotFound):
                commit = self._store.commit_at(repo, DEFAULT_BRANCH)
                yield repo, commit, self.facts_at(commit)

    def facts_at(self, commit: RepoCommit) -> Facts:
        """Return the metadata of the model card and the adapter's config at a commit."""
        return self._facts.get(commit.sha, lambda: self._read_facts(commit))

    def _read_facts(self, commit: RepoCommit) -> tuple[Facts, int]:
        card, config = (
            None if entry is None else self.metadata_bytes(entry)
            for entry in (commit.files.get(CARD_NAME), commit.files.get(ADAPTER_CONFIG_NAME))
        )
        has_safetensors = any(path.endswith(".safetensors") for path in commit.files)
        facts = facts_of(card_bytes=card, config_bytes=config, has_safetensors=has_safetensors)
        return facts, _BYTES_OF_FACTS + _OBJECTS_PER_TEXT * (len(card or b"") + len(config or b""))

    def metadata_bytes(self, entry: RepoFile) -> bytes:
        """Return the bytes of a small metadata file; b"" if it is too large.

        Also b"" for an LFS file of any size, which may have been permanently deleted from the repository.
        """
        if entry.sha256 is not None or entry.size > MAX_METADATA_BYTES:
            return b""
        return self._store.path_of(entry).read_bytes()


def _matches(repo: Repo, query: RepoQuery) -> bool:
    if query.author is not None and repo.repo_id.namespace != query.author:
        return False
    if query.gated is not None and query.gated is (repo.gated is None):
        return False
    return query.search is None or query.search.lower() in repo.id.lower()


def sibling_names(commit: RepoCommit) -> list[schemas.Sibling]:
    """Return the names of the files of a commit."""
    return [schemas.Sibling(rfilename=path) for path in commit.files]


def sibling_details(commit: RepoCommit) -> list[schemas.Sibling]:
    """Return the files of a commit, with sizes and ids."""
    return [
        schemas.Sibling(rfilename=path, size=entry.size, blob_id=entry.blob, lfs=_sibling_lfs(entry))
        for path, entry in commit.files.items()
    ]


def tree_file(path: str, entry: RepoFile) -> schemas.TreeFile:
    """Return one file as an entry of a tree listing."""
    lfs = None
    if entry.sha256 is not None:
        lfs = schemas.TreeLfs(oid=entry.sha256, size=entry.size, pointer_size=entry.pointer_size)
    return schemas.TreeFile(path=path, oid=entry.blob, size=entry.size, lfs=lfs)


def _sibling_lfs(entry: RepoFile) -> schemas.SiblingLfs | None:
    if entry.sha256 is None:
        return None
    return schemas.SiblingLfs(sha256=entry.sha256, size=entry.size, pointer_size=entry.pointer_size)


def _peft_config(facts: Facts) -> dict[str, object] | None:
    keys = ("base_model_name_or_path", "task_type", "peft_type")
    values = {key: facts.adapter_config[key] for key in keys if isinstance(facts.adapter_config.get(key), str)}
    return {"peft": values} if values else None
