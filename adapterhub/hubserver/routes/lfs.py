"""Routes of Git LFS: upload URLs for large objects, whole or in parts, and the uploads themselves.

An upload needs no token: its URL is signed and expires.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from adapterhub.errors import AdapterHubError
from adapterhub.hubserver.auth.tickets import UploadTicket
from adapterhub.hubserver.errors import TooLarge, UploadGone, UploadMismatch
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.routes.bodies import stream_body
from adapterhub.hubserver.routes.dependencies import (
    FILES,
    AddressedRepo,
    BaseUrl,
    ContributableRepo,
    HubDep,
    HubServices,
    PathSegment,
)
from adapterhub.hubserver.schemas import hub as schemas

MAX_OBJECT_BYTES = 50 * 10**9
"""Largest object that clients download over plain HTTP, in bytes."""
_UPLOADS = "/api/uploads/{prefix:prefix}{namespace}/{name}/{sha256}"

router = APIRouter()


@router.post(
    FILES + ".git/info/lfs/objects/batch",
    # Clients treat the presence of "error" as an error, even if it is null.
    response_model_exclude_none=True,
)
def lfs_batch(request: schemas.LfsBatch, repo: ContributableRepo, hub: HubDep, base_url: BaseUrl) -> schemas.LfsReply:
    """Return an upload URL for each object that the repository does not have yet."""
    is_in_parts = "multipart" in request.transfers and any(
        wanted.size > hub.quotas.limits.part_bytes for wanted in request.objects
    )
    batch = _BatchUpload(hub, repo.repo_id, base_url, is_in_parts)
    # One transfer mode applies to the whole batch; a small object then has one part.
    transfer = "multipart" if is_in_parts else "basic"
    return schemas.LfsReply(transfer=transfer, objects=[batch.reply(wanted) for wanted in request.objects])


@dataclass(frozen=True)
class _BatchUpload:
    hub: HubServices
    repo_id: RepoId
    base_url: str
    is_in_parts: bool
    promised: set[schemas.LfsObject] = field(default_factory=set)
    """Objects of this batch that the client is to upload; together they must stay within the quota."""

    def reply(self, wanted: schemas.LfsObject) -> schemas.LfsObjectReply:
        """Return the upload URLs of an object, or the reason why it cannot be uploaded."""
        try:
            actions = self._actions(wanted)
        except AdapterHubError as error:
            fault = schemas.LfsFault(code=error.http_status, message=str(error))
            return schemas.LfsObjectReply(oid=wanted.oid, size=wanted.size, error=fault)
        return schemas.LfsObjectReply(oid=wanted.oid, size=wanted.size, actions=actions)

    def _actions(self, wanted: schemas.LfsObject) -> schemas.LfsActions | None:
        if wanted.size > MAX_OBJECT_BYTES:
            raise TooLarge(f"the object has {wanted.size} bytes: expected at most {MAX_OBJECT_BYTES}.")
        if self.hub.store.has_lfs(self.repo_id, wanted.oid):
            return None
        added_bytes = sum(one.size for one in self.promised | {wanted})
        self.hub.quotas.check(self.repo_id, added_bytes=added_bytes)
        self.promised.add(wanted)
        ticket = self.hub.signer.ticket(self.repo_id, wanted.oid, size_bytes=wanted.size)
        upload = schemas.LfsAction(href=self._url(ticket))
        if self.is_in_parts:
            ticket = replace(ticket, spool=self.hub.store.objects.new_parts())
            part_bytes = self.hub.quotas.limits.part_bytes
            header = {"chunk_size": str(part_bytes)}
            for number in range(1, ceil(wanted.size / part_bytes) + 1):
                header[str(number)] = self._url(replace(ticket, part=number))
            upload = schemas.LfsAction(href=self._url(ticket), header=header)
        verify = schemas.LfsAction(href=f"{self.base_url}/{self.repo_id}.git/info/lfs/verify")
        return schemas.LfsActions(upload=upload, verify=verify)

    def _url(self, ticket: UploadTicket) -> str:
        query: dict[str, str | int] = {"size": ticket.size_bytes, "expires": ticket.expires_s}
        if ticket.spool:
            query |= {"spool": ticket.spool, "part": ticket.part}
        query |= {"signature": self.hub.signer.signature(ticket)}
        return f"{self.base_url}/api/uploads/{self.repo_id}/{ticket.sha256}?{urlencode(query)}"


def _ticket(
    repo_id: AddressedRepo,
    sha256: PathSegment,
    hub: HubDep,
    size: int,
    expires: int,
    signature: str,
    spool: str = "",
    part: int = 0,
) -> UploadTicket:
    ticket = UploadTicket(repo_id, sha256, size, expires, spool, part)
    hub.signer.check(ticket, signature)
    hub.store.repo(ticket.repo_id)
    return ticket


Ticket = Annotated[UploadTicket, Depends(_ticket)]


@router.put(_UPLOADS, max_body_size=MAX_OBJECT_BYTES)
async def receive_object(request: Request, response: Response, ticket: Ticket, hub: HubDep) -> None:
    """Store the body as an object, or as one part of it; the signed URL is the permission."""
    if ticket.spool:
        response.headers["ETag"] = f'"{ticket.part}"'
        await _receive_part(request, ticket, hub)
        return
    await run_in_threadpool(_check_space, ticket, hub, added_bytes=ticket.size_bytes)
    with contextlib.closing(hub.store.objects.begin_upload(ticket.sha256, size_bytes=ticket.size_bytes)) as upload:
        await stream_body(request, upload.write)
        await run_in_threadpool(upload.finish)
    await run_in_threadpool(_mark, ticket, hub)


async def _receive_part(request: Request, ticket: UploadTicket, hub: HubServices) -> None:
    part_bytes = hub.quotas.limits.part_bytes
    start = (ticket.part - 1) * part_bytes
    end = min(start + part_bytes, ticket.size_bytes)
    if not 0 <= start < end:
        raise UploadMismatch("this URL is for the whole object: send each part to its own URL.")
    await run_in_threadpool(_check_space, ticket, hub, added_bytes=end - start)
    with hub.store.objects.open_part(ticket.spool, start=start, end=end) as part:
        await stream_body(request, part.write)
        await run_in_threadpool(part.check_complete)


def _check_space(ticket: UploadTicket, hub: HubServices, *, added_bytes: int) -> None:
    """Check disk and quota again before the bytes are received: other uploads may have used the space since."""
    hub.quotas.check_disk(added_bytes=added_bytes)
    _check_quota(ticket, hub)


def _check_quota(ticket: UploadTicket, hub: HubServices) -> None:
    # An object that is sent again needs no more space.
    if not hub.store.has_lfs(ticket.repo_id, ticket.sha256):
        hub.quotas.check_quota(ticket.repo_id, added_bytes=ticket.size_bytes)


def _mark(ticket: UploadTicket, hub: HubServices) -> None:
    """Check the quota once more, for uploads that ran at the same time, and add the object to the repository."""
    _check_quota(ticket, hub)
    hub.store.mark_lfs(ticket.repo_id, ticket.sha256)


@router.post(_UPLOADS)
def finish_parts(request: schemas.LfsParts, ticket: Ticket, hub: HubDep) -> None:
    """Finish an upload in parts: check the whole object and publish it."""
    count = ceil(ticket.size_bytes / hub.quotas.limits.part_bytes)
    if not ticket.spool or ticket.part or [part.part_number for part in request.parts] != list(range(1, count + 1)):
        raise UploadMismatch(f"the object has {count} parts: list each one once, in order.")
    try:
        hub.store.objects.finish_parts(ticket.spool, sha256=ticket.sha256, size_bytes=ticket.size_bytes)
    except UploadGone:
        # A retry of a client that did not receive the first response, for example because a proxy timed out.
        if not hub.store.has_lfs(ticket.repo_id, ticket.sha256):
            raise
    _mark(ticket, hub)


@router.post(FILES + ".git/info/lfs/verify")
def verify_object(request: schemas.LfsObject, repo: ContributableRepo, hub: HubDep) -> None:
    """Answer 200 if the repository has the object with that size."""
    entry = hub.store.lfs_entry(repo.repo_id, request.oid)
    if entry.size != request.size:
        raise UploadMismatch(f"the object {request.oid} was stored with {entry.size} bytes: expected {request.size}.")
