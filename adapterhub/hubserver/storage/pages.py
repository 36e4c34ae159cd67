"""The files of a commit as pages, which commits share: a commit writes the pages that it changes and no others.

A page has the entries of neighbouring paths and is named by the sha256 of its bytes. Where a page ends depends on its
last path, so that an added or deleted file moves no other file to another page (content-defined chunking, as rsync and
Xet do it).
"""

from __future__ import annotations

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

from pydantic import TypeAdapter

from adapterhub.hubserver.storage.commit import RepoCommit, RepoFile
from adapterhub.strict import Strict

_MEAN_FILES = 256
_MAX_FILES = 4 * _MEAN_FILES
_ENTRIES = TypeAdapter(dict[str, RepoFile])


class PageRef(Strict):
    """A page of a commit: the sha256 of its bytes, in hex, and its first path."""

    id: str
    first: str


class PagedFiles(Mapping[str, RepoFile]):
    """The files of a commit by path, sorted; pages are read when they are needed."""

    def __init__(self, pages: tuple[PageRef, ...], count: int, read: Callable[[str], dict[str, RepoFile]]) -> None:
        self.pages = pages
        self._count = count
        self._firsts = [page.first for page in pages]
        self._read = read

    def __getitem__(self, path: str) -> RepoFile:
        number = bisect_right(self._firsts, path) - 1
        if number < 0:
            raise KeyError(path)
        return self._read(self.pages[number].id)[path]

    def __iter__(self) -> Iterator[str]:
        for page in self.pages:
            yield from self._read(page.id)

    def __len__(self) -> int:
        return self._count

    def page(self, page: PageRef) -> dict[str, RepoFile]:
        """Return the entries of a page."""
        return self._read(page.id)


def pages_of(commit: RepoCommit) -> Iterator[tuple[str, Mapping[str, RepoFile]]]:
    """Yield the pages of a commit: an id and the entries. A commit of adapterhub 0.1 is one page, by its own id."""
    if isinstance(commit.files, PagedFiles):
        for page in commit.files.pages:
            yield page.id, commit.files.page(page)
    else:
        yield commit.sha, commit.files


def split_pages(files: Mapping[str, RepoFile]) -> Iterator[tuple[PageRef, bytes]]:
    """Yield the pages of a commit, in order, with their bytes."""
    paths = sorted(files)
    for start, end in pairwise(_cuts(paths)):
        page = {path: files[path] for path in paths[start:end]}
        data = _ENTRIES.dump_json(page)
        yield PageRef(id=hashlib.sha256(data).hexdigest(), first=paths[start]), data


def parse_page(data: bytes) -> dict[str, RepoFile]:
    """Return the entries of a page."""
    return _ENTRIES.validate_json(data)


def _cuts(paths: list[str]) -> Iterator[int]:
    """Yield the index at which each page starts, and the end of the last one."""
    start = 0
    yield start
    for end, path in enumerate(paths, 1):
        if zlib.crc32(path.encode()) % _MEAN_FILES == 0 or end - start == _MAX_FILES or end == len(paths):
            yield end
            start = end
