"""Git object ids of blobs, trees and commits, computed without git.

Formats: git-scm.com/book, "Git Internals - Git Objects"; LFS pointers: the git-lfs specification, docs/spec.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

_FILE_MODE = "100644"
_FOLDER_MODE = "40000"
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:[0-9a-f]{64}\nsize (?:0|[1-9][0-9]*)\n"
)


def _object_id(kind: str, body: bytes) -> str:
    header = f"{kind} {len(body)}\0".encode()
    return hashlib.sha1(header + body, usedforsecurity=False).hexdigest()


def blob_id(data: bytes) -> str:
    """Return the blob id of a file with these bytes, in hex (`git hash-object`)."""
    return _object_id("blob", data)


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """Return the LFS pointer, the small text file that git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def is_lfs_pointer(data: bytes) -> bool:
    """Return whether a file's bytes are those that `lfs_pointer` returns for some object."""
    return _POINTER.fullmatch(data) is not None


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _folder_id(children: Mapping[str, tuple[str, str]]) -> str:
    """Return the id of one folder. Git sorts entries by bytes, and a folder as if its name ended in a slash."""

    def order(name: str) -> bytes:
        return (name + "/" if children[name][0] == _FOLDER_MODE else name).encode()

    body = b"".join(
        f"{children[name][0]} {name}\0".encode() + bytes.fromhex(children[name][1])
        for name in sorted(children, key=order)
    )
    return _object_id("tree", body)


def tree_ids(blobs: Mapping[str, str]) -> dict[str, str]:
    """Return the ids of all folders; the root is '' (`git mktree`, from the leaves up).

    `blobs` maps file paths to blob ids.
    """
    folders: dict[str, dict[str, tuple[str, str]]] = {"": {}}
    for path, oid in blobs.items():
        folder = _parent(path)
        folders.setdefault(folder, {})[path.removeprefix(f"{folder}/")] = (_FILE_MODE, oid)
        while folder:
            folder = _parent(folder)
            folders.setdefault(folder, {})
    ids: dict[str, str] = {}
    for folder in sorted(folders, key=lambda path: path.count("/") if path else -1, reverse=True):
        ids[folder] = _folder_id(folders[folder])
        if folder:
            parent = _parent(folder)
            folders[parent][folder.removeprefix(f"{parent}/")] = (_FOLDER_MODE, ids[folder])
    return ids


def commit_id(tree: str, parents: Sequence[str], *, author: str, time_s: int, message: str) -> str:
    """Return the id of a commit (`git commit-tree` with author = committer, in UTC).

    `time_s`: seconds since 1970. `author`: a user name; the email address that git requires is derived from it.
    `message` ends in a newline.
    """
    signature = f"{author} <{author}@localhost> {time_s} +0000"
    lines = [f"tree {tree}", *(f"parent {sha}" for sha in parents)]
    lines += [f"author {signature}", f"committer {signature}", "", message]
    return _object_id("commit", "\n".join(lines).encode())
