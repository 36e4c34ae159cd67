"""Copy an adapter and its history from one Hub to another, commit by commit. A stopped copy can be resumed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from adapterhub.adapter import Adapter
from adapterhub.errors import AdapterNotFound, Conflict, PackageError
from adapterhub.hub.client import Commit, Hub
from adapterhub.package.layout import check_names, open_adapter
from adapterhub.package.manifest import MANIFEST_NAME
from adapterhub.package.signing import check_signed_files

Report = Callable[[str], None]

_TRAILER = re.compile(r"^mirrored from (?P<place>\S+)@(?P<commit>[0-9a-f]{40})\s*\Z", re.MULTILINE)
"""Last line of a message; a mirror of a mirror has one for each."""
_TAG = re.compile(r"mirrored-([0-9a-f]{40})")
"""Marks a source commit that changed nothing, for which Hubs make no commit."""


def mirror(
    repo: str, source: Hub, target: Hub, *, name: str | None = None, report: Report = lambda line: None
) -> list[str]:
    """Copy the commits of `repo` at `source` to `name` (default: the same) at `target`. Return the new commits.

    Each commit is verified as a package. One that is not a package (an empty first commit, a partial upload) is left
    out and reported. The last line of a message, or a tag, names the source commit, so that a later mirror replays
    what follows the newest of them. A new copy is private and gated as the source is; an existing one is made so, and
    is never opened. Raises Conflict when the target has commits of its own, or gets one meanwhile, HubError kinds.
    """
    called = name or repo
    place = f"{source.endpoint}/{repo}"
    commits, access = source.commits(repo), source.access(repo)
    marks, head = _marks(target, called, place)
    if marks is not None and target.restrict(called, access):
        report(f"{called} at {target.endpoint} was more open than {place}: it is private or gated as that is now")
    made = []
    for commit in commits[_start(commits, marks or []) :]:
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as scratch:
            try:
                adapter = _fetched(source, repo, commit, Path(scratch))
            except (AdapterNotFound, PackageError) as error:
                report(f"{commit.id[:12]} {commit.title}: no package, left out ({error})")
                continue
            if marks is None:
                target.create(called, access)
                marks, head = [], target.commit_of(called)
            message = f"{commit.title}\n\n{commit.message}\n\nmirrored from {place}@{commit.id}"
            new = target.replace(adapter, called, message=message, parent=head)
        if new is None:
            tag = f"mirrored-{commit.id}"
            target.tag(called, tag, head, moves=tag in target.tags(called))
            report(f"{commit.id[:12]} {commit.title}: changes nothing there, marked with a tag")
        else:
            made.append(head := new)
            report(f"{commit.id[:12]} -> {new[:12]} {adapter.digest[:19]} {commit.title}")
    return made


def _fetched(source: Hub, repo: str, commit: Commit, folder: Path) -> Adapter:
    """Download one commit and verify it. Raises AdapterNotFound, PackageError for one that is not a package."""
    names = source.files(repo, commit.id)
    if MANIFEST_NAME not in names:
        raise AdapterNotFound(f"it has no {MANIFEST_NAME}")
    check_names(names)
    source.download(repo, commit.id, folder, patterns=names)
    adapter = open_adapter(folder)
    check_signed_files(adapter)
    return adapter


def _start(commits: list[Commit], marks: list[set[str]]) -> int:
    """Return the index of the first commit to replay: the one that follows the newest mirrored commit.

    `marks`: the source commits that each commit of the target stands for, newest first. Where the source's history was
    rewritten, the newest commit that both have is replayed again, because the target has moved on from it.
    """
    places = {commit.id: number for number, commit in enumerate(commits)}
    for age, mark in enumerate(marks):
        found = [places[one] for one in mark if one in places]
        if found:
            return max(found) + (age == 0)
    return 0


def _marks(target: Hub, repo: str, place: str) -> tuple[list[set[str]] | None, str]:
    """Return the source commits that each marked commit of the target stands for, newest first (None: no target).

    The second value is the commit that the target's main is at. Raises Conflict for a history that is not a mirror's.
    """
    try:
        there = target.commits(repo)
    except AdapterNotFound:
        return None, ""
    tagged: dict[str, set[str]] = {}
    for name, commit_id in target.tags(repo).items():
        if (tag := _TAG.fullmatch(name)) is not None:
            tagged.setdefault(commit_id, set()).add(tag[1])
    marks = []
    for commit in there:
        match = _TRAILER.search(commit.message)
        if match["place"] != place if match else MANIFEST_NAME in target.files(repo, commit.id):
            raise Conflict(
                f"{repo} at {target.endpoint} is not a mirror of {place} "
                f"({match['place'] if match else commit.title}): mirror it under another name."
            )
        mark = tagged.get(commit.id, set()) | ({match["commit"]} if match is not None else set())
        if mark:
            marks.append(mark)
    return marks[::-1], there[-1].id
