"""Routes that read files: listings and downloads."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse

from adapterhub.hubserver.errors import EntryNotFound, HubServerError
from adapterhub.hubserver.routes.dependencies import FILES, READ, REPO, HubDep, PathSegment, ReadableRepo, VisibleRepo
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.catalog import tree_file
from adapterhub.hubserver.storage.commit import RepoCommit

router = APIRouter()
_MAX_FORM_FIELDS = 10_000


class _Download(FileResponse):
    # A thread switch for each 64 KiB costs more than the read; with 1 MiB, fifty downloads at once took 100 MB more.
    chunk_size = 256 << 10


TreeEntry = schemas.TreeFile | schemas.TreeFolder


def _tree(commit: RepoCommit, folder: str) -> list[TreeEntry]:
    """Return all files and folders below a folder ('' is the root), sorted by path. Raises EntryNotFound."""
    folders = commit.folders()
    if folder not in folders:
        raise EntryNotFound(f"no folder {folder!r} at commit {commit.sha}.", commit_sha=commit.sha)
    prefix = f"{folder}/" if folder else ""
    entries: list[TreeEntry] = [tree_file(path, entry) for path, entry in commit.files_under(folder).items()]
    entries += [
        schemas.TreeFolder(path=path, oid=oid) for path, oid in folders.items() if path and path.startswith(prefix)
    ]
    return sorted(entries, key=lambda entry: entry.path)


@router.api_route(REPO + "/tree/{revision}", methods=READ)
@router.api_route(REPO + "/tree/{revision}/{path:path}", methods=READ)
def list_tree(
    repo: VisibleRepo, revision: PathSegment, hub: HubDep, path: PathSegment = "", recursive: bool = False
) -> list[TreeEntry]:
    """Return the files and folders in a folder, or at any depth below it if `recursive`."""
    folder = path.strip("/")
    entries = _tree(hub.store.commit_at(repo, revision), folder)
    return entries if recursive else [entry for entry in entries if entry.path.rpartition("/")[0] == folder]


async def _form_paths(request: Request) -> list[str]:
    try:
        form = parse_qs((await request.body()).decode(), max_num_fields=_MAX_FORM_FIELDS)
    except ValueError as error:
        raise HubServerError(f"the form cannot be parsed: {error}") from None
    return form.get("paths", [])


@router.post(REPO + "/paths-info/{revision}")
def paths_info(
    repo: VisibleRepo, revision: PathSegment, hub: HubDep, paths: Annotated[list[str], Depends(_form_paths)]
) -> list[TreeEntry]:
    """Return the entries of those requested paths that exist."""
    asked = {path.strip("/") for path in paths}
    return [entry for entry in _tree(hub.store.commit_at(repo, revision), "") if entry.path in asked]


@router.api_route(FILES + "/resolve/{revision}/{path:path}", methods=READ)
def download(repo: ReadableRepo, revision: PathSegment, path: PathSegment, hub: HubDep) -> FileResponse:
    """Send a file, whole or by Range, with headers that forbid a browser to execute it."""
    commit = hub.store.commit_at(repo, revision)
    entry = commit.file(path)
    if not hub.store.can_read(repo.repo_id, entry):
        raise EntryNotFound(f"{path!r} was permanently deleted from {repo.id}.", commit_sha=commit.sha)
    headers = {
        "ETag": f'"{entry.content_id}"',
        "X-Repo-Commit": commit.sha,
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if entry.sha256 is not None:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return _Download(
        hub.store.path_of(entry),
        headers=headers,
        media_type="application/octet-stream",
        filename=path.rpartition("/")[2],
    )
