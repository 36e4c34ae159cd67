"""Routes that bring files in: how to send each, the bytes of large ones, and the commit.

Holds at most one small file in memory per request.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from adapterhub.hubserver import wire
from adapterhub.hubserver.access import BaseUrl, Hub, HubHere, Part, User, Writable
from adapterhub.hubserver.bodies import lines, pieces
from adapterhub.hubserver.commits import Change, Commit, DeleteFile, DeleteFolder, FileEntry, PutFile
from adapterhub.hubserver.names import RepoId, check_path
from adapterhub.hubserver.refusals import Refusal, UploadMismatch
from adapterhub.hubserver.store import Repo
from adapterhub.hubserver.tickets import UploadTicket

MAX_REGULAR_BYTES = 10 << 20
"""files up to this size travel inside the commit; larger ones by LFS"""
MAX_OBJECT_BYTES = 50 * 10**9
"""what clients fetch over plain HTTP at most"""
MAX_COMMIT_BYTES = 1 << 30
_MAX_LINE_BYTES = MAX_REGULAR_BYTES * 4 // 3 + (64 << 10)
_LFS_CONTENT_TYPE = "application/vnd.git-lfs+json"

router = APIRouter()


@router.post("/api/models/{namespace}/{name}/preupload/{revision}")
def preupload(request: wire.Preupload, repo: Writable, revision: Part, hub: HubHere) -> wire.PreuploadReply:
    """Say for each file how to send it, and what is there now so that unchanged files stay at home."""
    head = hub.store.commit_at(repo, revision)
    return wire.PreuploadReply(files=[_upload_mode(file, head) for file in request.files])


def _upload_mode(file: wire.PreuploadFile, head: Commit) -> wire.PreuploadAnswer:
    current = head.files.get(check_path(file.path))
    return wire.PreuploadAnswer(
        path=file.path,
        upload_mode="regular" if file.size <= MAX_REGULAR_BYTES else "lfs",
        oid=current.content_id if current is not None else None,
    )


@router.post(
    "/{namespace}/{name}.git/info/lfs/objects/batch",
    # Clients take the mere presence of "error" for an error.
    response_model_exclude_none=True,
)
def lfs_batch(request: wire.LfsBatch, repo: Writable, hub: HubHere, base_url: BaseUrl) -> wire.LfsReply:
    """Where to send each large object that this repository does not have yet."""
    return wire.LfsReply(
        objects=[_lfs_answer(wanted, repo.repo_id, hub=hub, base_url=base_url) for wanted in request.objects]
    )


def _lfs_answer(wanted: wire.LfsObject, repo_id: RepoId, *, hub: Hub, base_url: str) -> wire.LfsAnswer:
    if wanted.size > MAX_OBJECT_BYTES:
        fault = wire.LfsFault(code=413, message=f"larger than {MAX_OBJECT_BYTES} bytes, the most taken here")
        return wire.LfsAnswer(oid=wanted.oid, size=wanted.size, error=fault)
    if hub.store.has_lfs(repo_id, wanted.oid):
        return wire.LfsAnswer(oid=wanted.oid, size=wanted.size)
    ticket = hub.signer.ticket(repo_id, wanted.oid, size_bytes=wanted.size)
    query = {"size": ticket.size_bytes, "expires": ticket.expires_s, "signature": hub.signer.signature(ticket)}
    actions = wire.LfsActions(
        upload=wire.LfsAction(href=f"{base_url}/api/uploads/{repo_id}/{wanted.oid}?{urlencode(query)}"),
        verify=wire.LfsAction(href=f"{base_url}/{repo_id}.git/info/lfs/verify"),
    )
    return wire.LfsAnswer(oid=wanted.oid, size=wanted.size, actions=actions)


@router.put("/api/uploads/{namespace}/{name}/{sha256}", max_body_size=MAX_OBJECT_BYTES)
async def receive_object(
    request: Request, namespace: Part, name: Part, sha256: Part, hub: HubHere, size: int, expires: int, signature: str
) -> None:
    """The bytes of one object; the signed address is the permission."""
    ticket = UploadTicket(RepoId(namespace, name), sha256, size, expires)
    hub.signer.check(ticket, signature)
    hub.store.repo(ticket.repo_id)
    with contextlib.closing(hub.store.objects.begin_upload(sha256, size_bytes=size)) as upload:
        async for piece in pieces(request):
            await run_in_threadpool(upload.write, piece)
        await run_in_threadpool(upload.finish)
    hub.store.mark_lfs(ticket.repo_id, sha256)


@router.post("/{namespace}/{name}.git/info/lfs/verify")
def verify_object(request: wire.LfsObject, repo: Writable, hub: HubHere) -> None:
    """200 when the object is here with that size."""
    entry = hub.store.lfs_entry(repo.repo_id, request.oid)
    if entry.size != request.size:
        raise UploadMismatch(f"the object {request.oid} has {entry.size} bytes here, not {request.size}.")


@router.post("/api/models/{namespace}/{name}/commit/{branch}", max_body_size=MAX_COMMIT_BYTES)
async def commit(
    request: Request, repo: Writable, branch: Part, user: User, hub: HubHere, base_url: BaseUrl, create_pr: str = ""
) -> wire.CommitReply:
    """Lines of JSON: a header, then the changes in order."""
    if create_pr:
        raise Refusal("there are no pull requests here: commit to a branch of your own.")
    header, changes = None, []
    async for line in lines(request, max_line_bytes=_MAX_LINE_BYTES):
        parsed = _parse_line(line)
        if isinstance(parsed, wire.HeaderLine):
            header = parsed.value
        else:
            changes.append(await run_in_threadpool(_change, parsed, hub, repo))
    if header is None:
        raise Refusal("the commit has no header line.")
    done = await run_in_threadpool(
        hub.store.commit,
        repo.repo_id,
        branch.removeprefix("refs/heads/"),
        changes=changes,
        author=user.user,
        title=header.summary,
        description=header.description,
        parent=header.parent_commit,
    )
    return wire.CommitReply(commit_oid=done.sha, commit_url=f"{base_url}/{repo.id}/commit/{done.sha}")


def _parse_line(line: bytes) -> wire.HeaderLine | wire.ChangeLine:
    try:
        return wire.COMMIT_LINE.validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        raise Refusal(f"a line of the commit cannot be read: {fault['loc']}: {fault['msg']}") from None


def _change(line: wire.ChangeLine, hub: Hub, repo: Repo) -> Change:
    """Store what the line carries, return what it changes."""
    check_path(line.value.path.rstrip("/"))
    match line:
        case wire.FileLine(value=file):
            data = _content(file)
            return PutFile(file.path, FileEntry(blob=hub.store.objects.put_blob(data), size=len(data)))
        case wire.LfsFileLine(value=file):
            entry = hub.store.lfs_entry(repo.repo_id, file.oid)
            if file.size not in (None, entry.size):
                raise UploadMismatch(f"{file.path!r} has {entry.size} bytes here, not the announced {file.size}.")
            return PutFile(file.path, entry)
        case wire.DeletedFileLine(value=gone):
            return DeleteFile(gone.path)
        case wire.DeletedFolderLine(value=gone):
            return DeleteFolder(gone.path)


def _content(file: wire.CommitFile) -> bytes:
    if file.encoding == "utf-8":
        return file.content.encode()
    try:
        return base64.b64decode(file.content, validate=True)
    except binascii.Error as error:
        raise Refusal(f"the content of {file.path!r} is not base64: {error}") from None
