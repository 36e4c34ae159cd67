"""The rules for names: repositories, their files, branches and tags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from adapterhub.hubserver.errors import InvalidName

MAX_PATH_BYTES = 1024
MAX_PART_BYTES = 255
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REF_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]*")
_MAX_REF = 200
PULL_PREFIX = "refs/pr/"
_PULL = re.compile(re.escape(PULL_PREFIX) + "([0-9]{1,9})")
MAX_NUMBER = 10**9 - 1
"""Largest number of a page, a discussion or a pull request in a URL."""
_SHA1 = re.compile(r"[0-9a-f]{40}")
_RESERVED_NAMESPACES = frozenset({"api", "datasets", "health", "models", "spaces", "v1"})


Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class RepoId:
    """The id of a repository: namespace, name and kind. Namespace and name are safe as folder names."""

    namespace: str
    name: str
    kind: Kind = "model"

    def __post_init__(self) -> None:
        check_namespace(self.namespace)
        _check_repo_part(self.name)
        if self.name.endswith(".git"):
            raise InvalidName(f"invalid repository name '{self}': '.git' at the end is reserved. Choose another name.")

    @classmethod
    def parse(cls, text: str) -> RepoId:
        """Parse `namespace/name` or `datasets/namespace/name`, which `str` writes. Raises InvalidName."""
        kind: Kind = "dataset" if text.startswith("datasets/") else "model"
        namespace, _, name = text.removeprefix("datasets/").partition("/")
        return cls(namespace, name, kind)

    @property
    def full_name(self) -> str:
        """`namespace/name`; a model and a data set may have the same one."""
        return f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        return f"datasets/{self.full_name}" if self.kind == "dataset" else self.full_name


def check_namespace(name: str) -> str:
    """Return `name` if it can own repositories, as a user or a team. Raises InvalidName."""
    if name in _RESERVED_NAMESPACES:
        raise InvalidName(f"invalid owner {name!r}: the name is reserved. Choose another name.")
    return _check_repo_part(name)


def _check_repo_part(name: str) -> str:
    if _REPO_PART.fullmatch(name) is None or any(bad in name for bad in ("..", "--")):
        raise InvalidName(
            f"invalid name {name!r} of a repository or its owner: use up to 96 letters, digits, '-', '_' and '.', "
            "no '--' or '..', and neither '-' nor '.' at the ends."
        )
    return name


def is_commit_sha(text: str) -> bool:
    """Return whether the text is a full commit id."""
    return _SHA1.fullmatch(text) is not None


def pull_number(revision: str) -> int | None:
    """Return N of `refs/pr/N`, or None if the revision is not a pull request."""
    found = _PULL.fullmatch(revision)
    return int(found[1]) if found is not None else None


def check_ref(name: str) -> str:
    """Return `name` if it is valid for a branch or a tag; slashes are allowed. Raises InvalidName."""
    parts = name.split("/")
    are_good = all(_REF_PART.fullmatch(part) and not part.endswith((".", ".lock")) for part in parts)
    if not are_good or ".." in name or name.startswith("refs/") or len(name) > _MAX_REF or is_commit_sha(name):
        raise InvalidName(
            f"invalid branch or tag name {name!r}: use up to {_MAX_REF} letters, digits, '.', '_', '-', '+', '@' and "
            "'/', but neither 40 hex digits nor 'refs/...'."
        )
    return name


def check_path(path: str) -> str:
    """Return `path` if a client can safely write it below a folder of its own. Raises InvalidName with the reason."""
    fault = _path_fault(path)
    if fault is not None:
        raise InvalidName(f"invalid path {path!r} in a repository: {fault}. Choose another path.")
    return path


def _path_fault(path: str) -> str | None:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if len(encoded) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    if not path.isprintable():
        return "it contains control characters"
    if "\\" in path:
        return "it contains a backslash"
    faults = (_part_fault(part) for part in path.split("/"))
    return next((fault for fault in faults if fault is not None), None)


def _part_fault(part: str) -> str | None:
    if not part:
        return "it is absolute or has an empty segment"
    if part in (".", ".."):
        return "'.' and '..' are not allowed"
    if part.lower() == ".git":
        return "'.git' is reserved"
    if len(part.encode()) > MAX_PART_BYTES:
        return f"a segment of it is longer than {MAX_PART_BYTES} bytes"
    return None
