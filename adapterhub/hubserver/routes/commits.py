"""Routes that add files: the upload mode of each file, and the commit itself.

A request holds at most one small file in memory.
"""

from __future__ import annotations

import base64
import binascii

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pathspec import GitIgnoreSpec
from pydantic import ValidationError

from adapterhub.hubserver.errors import HubServerError, TooLarge, UploadMismatch
from adapterhub.hubserver.names import check_path, pull_number
from adapterhub.hubserver.routes.bodies import iter_lines
from adapterhub.hubserver.routes.dependencies import (
    REPO,
    BaseUrl,
    ContributableRepo,
    HubDep,
    HubServices,
    PathSegment,
    User,
    check_can_write,
)
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.commit import (
    Change,
    DeleteFile,
    DeleteFolder,
    NewCommit,
    PutFile,
    RepoCommit,
    RepoFile,
)
from adapterhub.hubserver.storage.git_ids import is_lfs_pointer
from adapterhub.hubserver.storage.store import Repo

MAX_REGULAR_BYTES = 10 << 20
"""Largest file that a commit request itself carries, in bytes; larger files are sent by LFS."""
MAX_COMMIT_BYTES = 1 << 30
MAX_CHANGES = 50_000
"""Largest number of changes in a commit request."""
_MAX_LINE_BYTES = MAX_REGULAR_BYTES * 4 // 3 + (64 << 10)

router = APIRouter()


@router.post(REPO + "/preupload/{revision}")
def preupload(
    request: schemas.Preupload, repo: ContributableRepo, revision: PathSegment, hub: HubDep
) -> schemas.PreuploadReply:
    """Return the upload mode of each file, and its current content id, so that clients can skip unchanged files."""
    head = hub.store.commit_at(repo, revision)
    ignored = _ignore_rules(request, head, hub)
    return schemas.PreuploadReply(files=[_upload_mode(file, head, ignored) for file in request.files])


def _ignore_rules(request: schemas.Preupload, head: RepoCommit, hub: HubServices) -> GitIgnoreSpec:
    """Return the rules of the `.gitignore` in the request, or else of the one in the repository."""
    text, stored = request.git_ignore, head.files.get(".gitignore")
    if text is None and stored is not None:
        text = hub.catalog.metadata_bytes(stored).decode("utf-8", "replace")
    try:
        return GitIgnoreSpec.from_lines((text or "").splitlines())
    except ValueError as error:
        raise HubServerError(f"the .gitignore cannot be parsed: {error}") from None


def _upload_mode(file: schemas.PreuploadFile, head: RepoCommit, ignored: GitIgnoreSpec) -> schemas.PreuploadFileReply:
    current = head.files.get(check_path(file.path))
    return schemas.PreuploadFileReply(
        path=file.path,
        upload_mode="regular" if file.size <= MAX_REGULAR_BYTES else "lfs",
        should_ignore=ignored.match_file(file.path),
        oid=current.content_id if current is not None else None,
    )


@router.post(REPO + "/commit/{branch}", max_body_size=MAX_COMMIT_BYTES)
async def commit(
    request: Request,
    repo: ContributableRepo,
    branch: PathSegment,
    user: User,
    hub: HubDep,
    base_url: BaseUrl,
    create_pr: str = "",
) -> schemas.CommitReply:
    """Make a commit from JSON lines: a header, then the changes in order."""
    pull = pull_number(branch)
    if pull is not None:
        author = (await run_in_threadpool(hub.discussions.get, repo, pull)).author
        if author != user.user:
            check_can_write(user, repo.repo_id.namespace)
    elif not create_pr:
        check_can_write(user, repo.repo_id.namespace)
    header, changes, small_bytes = None, list[Change](), 0
    async for line in iter_lines(request, max_line_bytes=_MAX_LINE_BYTES):
        parsed = _parse_line(line)
        if isinstance(parsed, schemas.HeaderLine):
            header = parsed.value
        else:
            change = await run_in_threadpool(_change, parsed, hub, repo)
            changes.append(change)
            if len(changes) > MAX_CHANGES:
                raise TooLarge(f"the commit has more than {MAX_CHANGES} changes: send it as several commits.")
            if isinstance(change, PutFile) and change.entry.sha256 is None:
                small_bytes += change.entry.size
    if header is None:
        raise HubServerError("the commit has no header line: expected a line with the key 'header'.")
    await run_in_threadpool(hub.quotas.check, repo.repo_id, added_bytes=small_bytes)
    new = NewCommit(user.user, header.summary, header.description, header.parent_commit)
    return await run_in_threadpool(_commit, hub, repo, branch, changes, new, f"{base_url}/{repo.id}", bool(create_pr))


def _commit(
    hub: HubServices, repo: Repo, branch: str, changes: list[Change], new: NewCommit, address: str, is_new_pull: bool
) -> schemas.CommitReply:
    repo_id, base = repo.repo_id, branch.removeprefix("refs/heads/")
    pull_url, number = None, pull_number(branch)
    if is_new_pull:
        pull = hub.discussions.open(
            repo_id,
            author=new.author,
            title=new.title,
            description=new.description,
            is_pull=True,
            base=base,
            first=(changes, new),
        )
        assert pull.head is not None
        sha, pull_url = pull.head, f"{address}/discussions/{pull.num}"
    elif number is not None:
        sha = hub.discussions.commit(repo_id, number, changes=changes, new=new).sha
    else:
        sha = hub.store.commit(repo_id, base, changes=changes, new=new).sha
    return schemas.CommitReply(commit_oid=sha, commit_url=f"{address}/commit/{sha}", pull_request_url=pull_url)


def _parse_line(line: bytes) -> schemas.HeaderLine | schemas.ChangeLine:
    try:
        return schemas.COMMIT_LINE.validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        raise HubServerError(f"a line of the commit cannot be parsed: {fault['loc']}: {fault['msg']}") from None


def _change(line: schemas.ChangeLine, hub: HubServices, repo: Repo) -> Change:
    """Store the file in the line, if there is one, and return the change."""
    check_path(line.value.path.rstrip("/"))
    match line:
        case schemas.FileLine(value=file):
            data = _content(file)
            if is_lfs_pointer(data):
                # To git, this text is the file that it names: the two would have one commit id.
                raise HubServerError(
                    f"{file.path!r} is an LFS pointer, the text that git stores in place of a file: upload the file "
                    "itself (git lfs pull fetches it)."
                )
            return PutFile(file.path, RepoFile(blob=hub.store.objects.put_blob(data), size=len(data)))
        case schemas.LfsFileLine(value=file):
            entry = hub.store.lfs_entry(repo.repo_id, file.oid)
            if file.size not in (None, entry.size):
                raise UploadMismatch(
                    f"{file.path!r} was uploaded with {entry.size} bytes, but the commit announced {file.size}."
                )
            return PutFile(file.path, entry)
        case schemas.DeletedFileLine(value=gone):
            return DeleteFile(gone.path)
        case schemas.DeletedFolderLine(value=gone):
            return DeleteFolder(gone.path)


def _content(file: schemas.CommitFile) -> bytes:
    if file.encoding == "utf-8":
        return file.content.encode()
    try:
        return base64.b64decode(file.content, validate=True)
    except binascii.Error as error:
        raise HubServerError(f"the content of {file.path!r} is not base64: {error}") from None
