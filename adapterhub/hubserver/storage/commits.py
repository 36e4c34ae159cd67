"""Commits as values: which files, from which parents, by whom; and how changes make the next one. Knows no disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from adapterhub.hubserver.errors import BadName, EntryMissing
from adapterhub.hubserver.names import check_path
from adapterhub.hubserver.storage.git_ids import commit_id, lfs_pointer, tree_ids


class FileEntry(BaseModel):
    """One file at one commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    blob: str
    """git blob id: of the file, or of the LFS pointer that stands for it"""
    size: int
    """bytes of the file itself"""
    sha256: str | None = None
    """set for LFS files"""

    @property
    def content_id(self) -> str:
        """Changes exactly when the bytes change: sha256 for LFS files, git blob id for others."""
        return self.sha256 or self.blob

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer; 0 for other files."""
        return len(lfs_pointer(self.sha256, self.size)) if self.sha256 is not None else 0


class Commit(BaseModel):
    """A state of a whole repository; `sha` is the id git computes for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha: str
    parents: tuple[str, ...]
    author: str
    title: str
    description: str
    time_s: int
    """seconds since 1970"""
    files: dict[str, FileEntry]

    @classmethod
    def create(
        cls,
        files: Mapping[str, FileEntry],
        parents: tuple[str, ...],
        *,
        author: str,
        title: str,
        description: str = "",
        time_s: int,
    ) -> Commit:
        """Make the commit and compute its id."""
        tree = tree_ids({path: entry.blob for path, entry in files.items()})[""]
        message = f"{title}\n\n{description}\n" if description else f"{title}\n"
        return cls(
            sha=commit_id(tree, parents, author=author, time_s=time_s, message=message),
            parents=parents,
            author=author,
            title=title,
            description=description,
            time_s=time_s,
            files=dict(sorted(files.items())),
        )

    def folders(self) -> dict[str, str]:
        """Folder path -> git tree id; the root is ''."""
        return tree_ids({path: entry.blob for path, entry in self.files.items()})

    def file(self, path: str) -> FileEntry:
        """The entry of one file. Raises EntryMissing."""
        if path not in self.files:
            raise EntryMissing(f"no file {path!r} at commit {self.sha}.", commit_sha=self.sha)
        return self.files[path]

    def files_under(self, folder: str) -> dict[str, FileEntry]:
        """All files below a folder ('' is the root), at any depth."""
        prefix = f"{folder}/" if folder else ""
        return {path: entry for path, entry in self.files.items() if path.startswith(prefix)}


@dataclass(frozen=True)
class NewCommit:
    """What is said of a commit that is about to be made."""

    author: str
    title: str
    description: str = ""
    parent: str | None = None
    """the (possibly shortened) commit the branch must be at: compare and swap"""


@dataclass(frozen=True)
class PutFile:
    path: str
    entry: FileEntry


@dataclass(frozen=True)
class DeleteFile:
    path: str


@dataclass(frozen=True)
class DeleteFolder:
    path: str


Change = PutFile | DeleteFile | DeleteFolder


def files_after(head: Commit, changes: Iterable[Change]) -> dict[str, FileEntry]:
    """The files of `head` with the changes made in order.

    Raises BadName for an unsafe path or a file where a folder is, EntryMissing for deleting what is not there.
    """
    files = dict(head.files)
    for change in changes:
        match change:
            case PutFile(path, entry):
                files[check_path(path)] = entry
            case DeleteFile(path):
                _drop(files, [path] if path in files else [], head=head, path=path)
            case DeleteFolder(path):
                inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
                _drop(files, inside, head=head, path=path)
    _check_no_file_is_a_folder(files)
    return files


def _drop(files: dict[str, FileEntry], paths: list[str], *, head: Commit, path: str) -> None:
    if not paths:
        # Clients look for the first words to add a hint about files and folders.
        raise EntryMissing(f"A file with this name doesn't exist: {path!r}", commit_sha=head.sha)
    for found in paths:
        del files[found]


def _check_no_file_is_a_folder(files: Mapping[str, FileEntry]) -> None:
    for path in files:
        folder = path.rpartition("/")[0]
        while folder:
            if folder in files:
                raise BadName(f"{folder!r} is a file, so {path!r} cannot be below it; delete the file first.")
            folder = folder.rpartition("/")[0]
