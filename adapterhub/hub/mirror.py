"""Copy an adapter and its history from one Hub to another, commit by commit. A stopped copy can be resumed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from adapterhub.errors import AdapterNotFound, Conflict
from adapterhub.hub.client import Commit, Hub
from adapterhub.package.layout import check_names, open_adapter
from adapterhub.package.manifest import MANIFEST_NAME

Report = Callable[[str], None]

_TRAILER = re.compile(r"^mirrored from (?P<place>\S+)@(?P<commit>[0-9a-f]{40})\s*\Z", re.MULTILINE)
"""Last line of a message; a mirror of a mirror has one for each."""


def mirror(
    repo: str, source: Hub, target: Hub, *, name: str | None = None, report: Report = lambda line: None
) -> list[str]:
    """Copy the commits of `repo` at `source` to `name` (default: the same) at `target`. Return the new commits.

    Each commit is verified as a package. One that is not a package (an empty first commit, a partial upload) is left
    out and reported. The last line of a message names the source commit, so that a later mirror continues there. Raises
    Conflict when the target has commits of its own, HubError kinds.
    """
    called = name or repo
    place = f"{source.endpoint}/{repo}"
    done = _mirrored(target, called, place)
    made = []
    for commit in source.commits(repo):
        if commit.id in done:
            continue
        names = source.files(repo, commit.id)
        if MANIFEST_NAME not in names:
            report(f"{commit.id[:12]} {commit.title}: no package, left out")
            continue
        check_names(names)
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as scratch:
            folder = Path(scratch) / "package"
            folder.mkdir()
            source.download(repo, commit.id, folder, patterns=names)
            adapter = open_adapter(folder)
            made.append(target.replace(folder, called, message=_message(commit, place)))
        report(f"{commit.id[:12]} -> {made[-1][:12]} {adapter.digest[:19]} {commit.title}")
    return made


def _message(commit: Commit, place: str) -> str:
    return f"{commit.title}\n\n{commit.message}\n\nmirrored from {place}@{commit.id}"


def _mirrored(target: Hub, repo: str, place: str) -> set[str]:
    """Return the source's commits that the target has. Raises Conflict for a history that is not a mirror's."""
    try:
        there = target.commits(repo)
    except AdapterNotFound:
        return set()
    found = [_TRAILER.search(commit.message) for commit in there]
    unmarked = [commit for commit, match in zip(there, found, strict=True) if match is None]
    own = [commit for commit in unmarked if MANIFEST_NAME in target.files(repo, commit.id)]
    others = [match["place"] for match in found if match is not None and match["place"] != place]
    if own or others:
        raise Conflict(
            f"{repo} at {target.endpoint} is not a mirror of {place} ({own[0].title if own else others[0]}): mirror it "
            "under another name."
        )
    return {match["commit"] for match in found if match is not None}
