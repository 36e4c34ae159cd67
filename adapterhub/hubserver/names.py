"""Which names are safe: files in a repository, repositories, branches and tags. Knows no disk and no HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from adapterhub.hubserver.errors import BadName

MAX_PATH_BYTES = 1024
MAX_PART_BYTES = 255
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REF_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]*")
_MAX_REF = 200
PULL_PREFIX = "refs/pr/"
_PULL = re.compile(re.escape(PULL_PREFIX) + "([0-9]{1,9})")
MAX_NUMBER = 10**9 - 1
"""of a page, a discussion or a pull request in an address"""
_SHA1 = re.compile(r"[0-9a-f]{40}")
_RESERVED_NAMESPACES = frozenset({"api", "datasets", "health", "models", "spaces", "v1"})


Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class RepoId:
    """`namespace/name` of a repository and what it holds; both parts are safe as folder names."""

    namespace: str
    name: str
    kind: Kind = "model"

    def __post_init__(self) -> None:
        check_namespace(self.namespace)
        _check_repo_part(self.name)
        if self.name.endswith(".git"):
            raise BadName(f"'{self}' cannot name a repository: '.git' at the end is reserved.")

    @classmethod
    def parse(cls, text: str) -> RepoId:
        """Read what `str` gives: `namespace/name`, or `datasets/namespace/name`. Raises BadName."""
        kind: Kind = "dataset" if text.startswith("datasets/") else "model"
        namespace, _, name = text.removeprefix("datasets/").partition("/")
        return cls(namespace, name, kind)

    @property
    def full_name(self) -> str:
        """What clients call it; a model and a data set may share one."""
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        return f"datasets/{self.full_name}" if self.kind == "dataset" else self.full_name


def check_namespace(name: str) -> str:
    """Return `name` if it can own repositories: a user or a team. Raises BadName."""
    if name in _RESERVED_NAMESPACES:
        raise BadName(f"{name!r} is reserved and cannot own repositories: choose another name.")
    return _check_repo_part(name)


def _check_repo_part(name: str) -> str:
    if _REPO_PART.fullmatch(name) is None or any(bad in name for bad in ("..", "--")):
        raise BadName(
            f"{name!r} cannot name a repository or its owner: use up to 96 letters, digits, '-', '_' and '.', "
            "no '--' or '..', and neither '-' nor '.' at the ends."
        )
    return name


def is_commit_sha(text: str) -> bool:
    return _SHA1.fullmatch(text) is not None


def pull_number(revision: str) -> int | None:
    """N of `refs/pr/N`; None for what names no pull request."""
    found = _PULL.fullmatch(revision)
    return int(found[1]) if found is not None else None


def check_ref(name: str) -> str:
    """Return `name` if it can be a branch or a tag (slashes allowed). Raises BadName."""
    parts = name.split("/")
    are_good = all(_REF_PART.fullmatch(part) and not part.endswith((".", ".lock")) for part in parts)
    if not are_good or ".." in name or name.startswith("refs/") or len(name) > _MAX_REF or is_commit_sha(name):
        raise BadName(
            f"{name!r} cannot name a branch or tag: use letters, digits, '.', '_', '-', '+', '@', '/', "
            f"up to {_MAX_REF} characters; not 40 hex digits, not 'refs/...'."
        )
    return name


def check_path(path: str) -> str:
    """Return `path` if a client can safely write it below a folder of its own. Raises BadName with the reason."""
    fault = _path_fault(path)
    if fault is not None:
        raise BadName(f"{path!r} cannot be a file in a repository: {fault}.")
    return path


def _path_fault(path: str) -> str | None:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if len(encoded) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    if not path.isprintable():
        return "it holds control characters"
    if "\\" in path:
        return "it holds a backslash"
    faults = (_part_fault(part) for part in path.split("/"))
    return next((fault for fault in faults if fault is not None), None)


def _part_fault(part: str) -> str | None:
    if not part:
        return "a part of it is empty (or it is absolute)"
    if part in (".", ".."):
        return "'.' and '..' are not names"
    if part.lower() == ".git":
        return "'.git' is reserved"
    if len(part.encode()) > MAX_PART_BYTES:
        return f"a part of it is longer than {MAX_PART_BYTES} bytes"
    return None
