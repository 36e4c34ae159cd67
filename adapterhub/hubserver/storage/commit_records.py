"""Commits on disk, in the folder of their repository: `commits/<sha>.json` and the pages that they share, `pages/`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from adapterhub.files import make_folder, sync, write_atomic
from adapterhub.hubserver.errors import RevisionNotFound
from adapterhub.hubserver.storage.commit import RepoCommit, RepoFile
from adapterhub.hubserver.storage.objects import touch_if_exists, write_synced
from adapterhub.hubserver.storage.pages import PagedFiles, PageRef, parse_page, split_pages
from adapterhub.hubserver.storage.sized_cache import SizedCache
from adapterhub.strict import Strict

_COMMIT_CACHE_BYTES = 16 << 20
_PAGE_CACHE_BYTES = 64 << 20
_OBJECTS_PER_JSON = 7
"""Size of parsed entries in memory, relative to their JSON (measured: 4.7 to 6.6)."""


class _CommitRecord(Strict):
    sha: str
    parents: tuple[str, ...]
    author: str
    title: str
    description: str
    time_s: int
    files: dict[str, RepoFile] | None = None
    """All files; only in records of adapterhub 0.1."""
    pages: tuple[PageRef, ...] = ()
    num_files: int = 0
    size_bytes: int = 0


class CommitRecords:
    """Reads and writes the commits of all repositories; caches what it read, because commits never change."""

    def __init__(self) -> None:
        self._commits = SizedCache[RepoCommit](_COMMIT_CACHE_BYTES)
        self._pages = SizedCache[dict[str, RepoFile]](_PAGE_CACHE_BYTES)

    def read(self, folder: Path, sha: str) -> RepoCommit:
        """Return a commit of the repository in `folder`. Raises FileNotFoundError."""
        path = commit_path(folder, sha)
        # Checked each time: the cache may have it from a deleted repository with the same name.
        path.stat()
        return self._commits.get(path, lambda: self._load(path))

    def write(self, folder: Path, commit: RepoCommit) -> int:
        """Write a commit and those of its pages that the repository does not have; return their size in bytes.

        They are on disk when this returns. The caller holds the repository's lock.
        """
        path, pages_folder = commit_path(folder, commit.sha), folder / "pages"
        if touch_if_exists(path):
            return 0
        make_folder(pages_folder)
        refs, written = [], 0
        for ref, data in split_pages(commit.files):
            refs.append(ref)
            page = page_path(folder, ref.id)
            if not touch_if_exists(page):
                write_synced(page, data)
                written += len(data)
        sync(pages_folder)
        record = _CommitRecord(
            sha=commit.sha,
            parents=commit.parents,
            author=commit.author,
            title=commit.title,
            description=commit.description,
            time_s=commit.time_s,
            pages=tuple(refs),
            num_files=len(commit.files),
            size_bytes=commit.size_bytes,
        ).model_dump_json(exclude_defaults=True)
        write_atomic(path, record)
        return written + len(record)

    def _load(self, path: Path) -> tuple[RepoCommit, int]:
        data = path.read_bytes()
        record = _CommitRecord.model_validate_json(data)
        files: Mapping[str, RepoFile] | None = record.files
        if files is None:
            files = PagedFiles(record.pages, record.num_files, partial(self._page, path.parent.parent))
        commit = RepoCommit(
            sha=record.sha,
            parents=record.parents,
            author=record.author,
            title=record.title,
            description=record.description,
            time_s=record.time_s,
            files=files,
            size_bytes=record.size_bytes or sum(entry.size for entry in (record.files or {}).values()),
        )
        return commit, len(data) * _OBJECTS_PER_JSON

    def _page(self, folder: Path, page_id: str) -> dict[str, RepoFile]:
        def read() -> tuple[dict[str, RepoFile], int]:
            data = page_path(folder, page_id).read_bytes()
            return parse_page(data), len(data) * _OBJECTS_PER_JSON

        try:
            return self._pages.get(page_id, read)
        except FileNotFoundError:
            raise RevisionNotFound("the commit was deleted while it was read: ask again.") from None


def commit_path(folder: Path, sha: str) -> Path:
    """Return the path of a commit's record."""
    return folder / "commits" / f"{sha}.json"


def page_path(folder: Path, page_id: str) -> Path:
    """Return the path of a page."""
    return folder / "pages" / f"{page_id}.json"
