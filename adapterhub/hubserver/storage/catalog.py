"""Which models there are and what is told of each: filters, sorting, replies. Knows no users' rights and no routes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from adapterhub.hubserver.errors import RevisionMissing
from adapterhub.hubserver.names import Kind
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.cards import ADAPTER_CONFIG_NAME, CARD_NAME, MAX_DESCRIBING_BYTES, Facts, facts_of
from adapterhub.hubserver.storage.commits import Commit, FileEntry
from adapterhub.hubserver.storage.store import DEFAULT_BRANCH, HubStore, Repo

MAX_PAGE = 1000


@dataclass(frozen=True)
class Query:
    """Which models, or data sets, to list; every condition must hold."""

    tags: tuple[str, ...] = ()
    author: str | None = None
    search: str | None = None
    """part of `namespace/name`, in any case"""
    sort: str | None = None
    """`createdAt`; anything else is by last change, as nothing else is counted here. Newest first"""
    limit: int = MAX_PAGE
    skip: int = 0
    kind: Kind = "model"
    gated: bool | None = None


@dataclass(frozen=True)
class Page:
    models: tuple[tuple[Repo, Commit], ...]
    next_skip: int | None
    """None: this is the last page"""


class Catalog:
    """Reads descriptions out of a store and remembers them by content."""

    def __init__(self, store: HubStore) -> None:
        self._store = store
        self._facts = lru_cache(maxsize=4096)(self._read_facts)

    def page(self, query: Query, *, can_see: Callable[[Repo], bool]) -> Page:
        """One page of the models that match."""
        found = [
            (repo, commit)
            for repo, commit in self._heads(query.kind)
            if can_see(repo) and _is_asked(repo, query) and set(query.tags) <= set(self.facts_at(commit).tags)
        ]
        found.sort(key=lambda model: model[0].created_s if query.sort == "createdAt" else model[1].time_s, reverse=True)
        end = query.skip + query.limit
        return Page(tuple(found[query.skip : end]), end if end < len(found) else None)

    def model(self, repo: Repo, commit: Commit, *, siblings: list[schemas.Sibling] | None = None) -> schemas.Model:
        """What is told of a model at a commit."""
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
            used_storage=sum(entry.size for entry in commit.files.values()),
            siblings=siblings,
        )

    def _heads(self, kind: Kind) -> Iterator[tuple[Repo, Commit]]:
        for repo in self._store.repos(kind):
            # Somebody may delete one while we look.
            with contextlib.suppress(RevisionMissing):
                yield repo, self._store.commit_at(repo, DEFAULT_BRANCH)

    def facts_at(self, commit: Commit) -> Facts:
        """What the card and the adapter's config say at a commit."""
        has_safetensors = any(path.endswith(".safetensors") for path in commit.files)
        return self._facts(commit.files.get(CARD_NAME), commit.files.get(ADAPTER_CONFIG_NAME), has_safetensors)

    def _read_facts(self, card: FileEntry | None, config: FileEntry | None, has_safetensors: bool) -> Facts:
        return facts_of(
            card_bytes=None if card is None else self.describing_bytes(card),
            config_bytes=None if config is None else self.describing_bytes(config),
            has_safetensors=has_safetensors,
        )

    def describing_bytes(self, entry: FileEntry) -> bytes:
        """What a small file says that describes the others; nothing for one that is too large to be read.

        Nor for a large object of any size: it may have been removed from this repository for good.
        """
        if entry.sha256 is not None or entry.size > MAX_DESCRIBING_BYTES:
            return b""
        return self._store.path_of(entry).read_bytes()


def _is_asked(repo: Repo, query: Query) -> bool:
    if query.author is not None and repo.repo_id.namespace != query.author:
        return False
    if query.gated is not None and query.gated is (repo.gated is None):
        return False
    return query.search is None or query.search.lower() in repo.id.lower()


def sibling_names(commit: Commit) -> list[schemas.Sibling]:
    """The files of a commit, by name only."""
    return [schemas.Sibling(rfilename=path) for path in commit.files]


def sibling_details(commit: Commit) -> list[schemas.Sibling]:
    """The files of a commit, with sizes and ids."""
    return [
        schemas.Sibling(rfilename=path, size=entry.size, blob_id=entry.blob, lfs=_sibling_lfs(entry))
        for path, entry in commit.files.items()
    ]


def tree_file(path: str, entry: FileEntry) -> schemas.TreeFile:
    """One file as a line of a tree listing."""
    lfs = None
    if entry.sha256 is not None:
        lfs = schemas.TreeLfs(oid=entry.sha256, size=entry.size, pointer_size=entry.pointer_size)
    return schemas.TreeFile(path=path, oid=entry.blob, size=entry.size, lfs=lfs)


def _sibling_lfs(entry: FileEntry) -> schemas.SiblingLfs | None:
    if entry.sha256 is None:
        return None
    return schemas.SiblingLfs(sha256=entry.sha256, size=entry.size, pointer_size=entry.pointer_size)


def _peft_config(facts: Facts) -> dict[str, object] | None:
    keys = ("base_model_name_or_path", "task_type", "peft_type")
    told = {key: facts.adapter_config[key] for key in keys if isinstance(facts.adapter_config.get(key), str)}
    return {"peft": told} if told else None
