"""Commits as immutable values, and the changes that lead from one commit to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adapterhub.hubserver.errors import EntryNotFound, InvalidName, TooLarge
from adapterhub.hubserver.names import check_path
from adapterhub.hubserver.storage.git_ids import commit_id, lfs_pointer, tree_ids
from adapterhub.strict import Strict

MAX_FILES = 200_000
"""Largest number of files in a commit."""


class RepoFile(Strict):
    """The entry of one file in a commit."""

    blob: str
    """Git blob id of the file, or of the LFS pointer in its place."""
    size: int
    """Size of the file itself, in bytes."""
    sha256: str | None = None
    """The file's sha256, in hex; None for files that are not stored by LFS."""

    @property
    def content_id(self) -> str:
        """An id of the file's bytes: the sha256 of an LFS file, the git blob id of any other."""
        return self.sha256 or self.blob

    @property
    def pointer_size(self) -> int:
        """Size of the LFS pointer, in bytes; 0 for other files."""
        return len(lfs_pointer(self.sha256, self.size)) if self.sha256 is not None else 0


@dataclass(frozen=True)
class RepoCommit:
    """A snapshot of a whole repository; `sha` is the commit id that git computes."""

    sha: str
    parents: tuple[str, ...]
    author: str
    title: str
    description: str
    time_s: int
    """Commit time, in seconds since 1970."""
    files: Mapping[str, RepoFile] = field(compare=False, repr=False)
    """Sorted by path; read from disk when they are needed."""
    size_bytes: int
    """Size of all files together, in bytes."""

    @classmethod
    def create(
        cls,
        files: Mapping[str, RepoFile],
        parents: tuple[str, ...],
        *,
        author: str,
        title: str,
        description: str = "",
        time_s: int,
    ) -> RepoCommit:
        """Create a commit and compute its id."""
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
            size_bytes=sum(entry.size for entry in files.values()),
        )

    def folders(self) -> dict[str, str]:
        """Return a mapping from folder path to git tree id; the root is ''."""
        return tree_ids({path: entry.blob for path, entry in self.files.items()})

    def file(self, path: str) -> RepoFile:
        """Return the entry of one file. Raises EntryNotFound."""
        if path not in self.files:
            raise EntryNotFound(f"no file {path!r} at commit {self.sha}.", commit_sha=self.sha)
        return self.files[path]

    def files_under(self, folder: str) -> dict[str, RepoFile]:
        """Return all files below a folder ('' is the root), at any depth."""
        prefix = f"{folder}/" if folder else ""
        return {path: entry for path, entry in self.files.items() if path.startswith(prefix)}


@dataclass(frozen=True)
class NewCommit:
    """The author, message and expected parent of a commit to create."""

    author: str
    title: str
    description: str = ""
    parent: str | None = None
    """Commit id, or a prefix of it, at which the branch must be (compare-and-swap)."""


@dataclass(frozen=True)
class PutFile:
    """Add or replace a file."""

    path: str
    entry: RepoFile


@dataclass(frozen=True)
class DeleteFile:
    """Delete a file."""

    path: str


@dataclass(frozen=True)
class DeleteFolder:
    """Delete a folder with all files in it."""

    path: str


Change = PutFile | DeleteFile | DeleteFolder


def files_after(head: RepoCommit, changes: Iterable[Change]) -> dict[str, RepoFile]:
    """Apply the changes to the files of `head`, in order.

    Raises InvalidName for an unsafe path or for a file with the path of a folder, EntryNotFound for a deletion of
    something that does not exist, TooLarge for too many files.
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
    check_files(files)
    return files


def check_files(files: Mapping[str, RepoFile]) -> None:
    """Check that the files fit in one commit. Raises InvalidName for a file with the path of a folder, TooLarge."""
    if len(files) > MAX_FILES:
        raise TooLarge(f"the commit would have {len(files)} files: expected at most {MAX_FILES}. Pack them into fewer.")
    _check_no_file_is_a_folder(files)


def _drop(files: dict[str, RepoFile], paths: list[str], *, head: RepoCommit, path: str) -> None:
    if not paths:
        # Clients recognize the first words and add a hint about files and folders.
        raise EntryNotFound(f"A file with this name doesn't exist: {path!r}", commit_sha=head.sha)
    for found in paths:
        del files[found]


def _check_no_file_is_a_folder(files: Mapping[str, RepoFile]) -> None:
    for path in files:
        folder = path.rpartition("/")[0]
        while folder:
            if folder in files:
                raise InvalidName(f"cannot add {path!r}: {folder!r} is a file. Delete the file first.")
            folder = folder.rpartition("/")[0]
