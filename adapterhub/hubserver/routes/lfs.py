"""Routes of LFS: where to send large objects, whole or in parts, and their bytes.

The bytes come without a token: their address is signed and expires.
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
from adapterhub.hubserver.errors import TooLarge, UploadEnded, UploadMismatch
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.routes.bodies import pour
from adapterhub.hubserver.routes.dependencies import FILES, AddressedRepo, BaseUrl, Contributable, Hub, HubHere, Part
from adapterhub.hubserver.schemas import hub as schemas

MAX_OBJECT_BYTES = 50 * 10**9
"""what clients fetch over plain HTTP at most"""
_UPLOADS = "/api/uploads/{prefix:prefix}{namespace}/{name}/{sha256}"

router = APIRouter()


@router.post(
    FILES + ".git/info/lfs/objects/batch",
    # Clients take the mere presence of "error" for an error.
    response_model_exclude_none=True,
)
def lfs_batch(request: schemas.LfsBatch, repo: Contributable, hub: HubHere, base_url: BaseUrl) -> schemas.LfsReply:
    """Where to send each large object that this repository does not have yet."""
    is_in_parts = "multipart" in request.transfers and any(
        wanted.size > hub.quotas.limits.part_bytes for wanted in request.objects
    )
    offer = _Offer(hub, repo.repo_id, base_url, is_in_parts)
    # One transfer holds for the whole batch; a small object is then one part.
    transfer = "multipart" if is_in_parts else "basic"
    return schemas.LfsReply(transfer=transfer, objects=[offer.answer(wanted) for wanted in request.objects])


@dataclass(frozen=True)
class _Offer:
    hub: Hub
    repo_id: RepoId
    base_url: str
    is_in_parts: bool
    promised: set[schemas.LfsObject] = field(default_factory=set)
    """what this batch was offered to send; none of it is here yet, and all of it must fit"""

    def answer(self, wanted: schemas.LfsObject) -> schemas.LfsAnswer:
        try:
            actions = self._actions(wanted)
        except AdapterHubError as error:
            fault = schemas.LfsFault(code=error.http_status, message=str(error))
            return schemas.LfsAnswer(oid=wanted.oid, size=wanted.size, error=fault)
        return schemas.LfsAnswer(oid=wanted.oid, size=wanted.size, actions=actions)

    def _actions(self, wanted: schemas.LfsObject) -> schemas.LfsActions | None:
        if wanted.size > MAX_OBJECT_BYTES:
            raise TooLarge(f"larger than {MAX_OBJECT_BYTES} bytes, the most taken here.")
        if self.hub.store.has_lfs(self.repo_id, wanted.oid):
            return None
        added_bytes = sum(one.size for one in self.promised | {wanted})
        self.hub.quotas.check(self.repo_id, added_bytes=added_bytes)
        self.promised.add(wanted)
        ticket = self.hub.signer.ticket(self.repo_id, wanted.oid, size_bytes=wanted.size)
        upload = schemas.LfsAction(href=self._address(ticket))
        if self.is_in_parts:
            ticket = replace(ticket, spool=self.hub.store.objects.new_parts())
            part_bytes = self.hub.quotas.limits.part_bytes
            header = {"chunk_size": str(part_bytes)}
            for number in range(1, ceil(wanted.size / part_bytes) + 1):
                header[str(number)] = self._address(replace(ticket, part=number))
            upload = schemas.LfsAction(href=self._address(ticket), header=header)
        verify = schemas.LfsAction(href=f"{self.base_url}/{self.repo_id}.git/info/lfs/verify")
        return schemas.LfsActions(upload=upload, verify=verify)

    def _address(self, ticket: UploadTicket) -> str:
        query: dict[str, str | int] = {"size": ticket.size_bytes, "expires": ticket.expires_s}
        if ticket.spool:
            query |= {"spool": ticket.spool, "part": ticket.part}
        query |= {"signature": self.hub.signer.signature(ticket)}
        return f"{self.base_url}/api/uploads/{self.repo_id}/{ticket.sha256}?{urlencode(query)}"


def _ticket(
    repo_id: AddressedRepo,
    sha256: Part,
    hub: HubHere,
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
async def receive_object(request: Request, response: Response, ticket: Ticket, hub: HubHere) -> None:
    """The bytes of one object, or of one part of it; the signed address is the permission."""
    if ticket.spool:
        response.headers["ETag"] = f'"{ticket.part}"'
        await _receive_part(request, ticket, hub)
        return
    await run_in_threadpool(_check_room, ticket, hub, coming_bytes=ticket.size_bytes)
    with contextlib.closing(hub.store.objects.begin_upload(ticket.sha256, size_bytes=ticket.size_bytes)) as upload:
        await pour(request, upload.write)
        await run_in_threadpool(upload.finish)
    await run_in_threadpool(_mark, ticket, hub)


async def _receive_part(request: Request, ticket: UploadTicket, hub: Hub) -> None:
    part_bytes = hub.quotas.limits.part_bytes
    start = (ticket.part - 1) * part_bytes
    end = min(start + part_bytes, ticket.size_bytes)
    if not 0 <= start < end:
        raise UploadMismatch("this address stands for the whole object: send its parts to their own.")
    await run_in_threadpool(_check_room, ticket, hub, coming_bytes=end - start)
    with hub.store.objects.open_part(ticket.spool, start=start, end=end) as part:
        await pour(request, part.write)
        await run_in_threadpool(part.check_complete)


def _check_room(ticket: UploadTicket, hub: Hub, *, coming_bytes: int) -> None:
    """Asked again as bytes come: what else was offered since may have taken the room."""
    hub.quotas.check_disk(coming_bytes=coming_bytes)
    _check_quota(ticket, hub)


def _check_quota(ticket: UploadTicket, hub: Hub) -> None:
    # Sent again, it would take nothing more.
    if not hub.store.has_lfs(ticket.repo_id, ticket.sha256):
        hub.quotas.check_kept(ticket.repo_id, added_bytes=ticket.size_bytes)


def _mark(ticket: UploadTicket, hub: Hub) -> None:
    """The last word of the quota: others may have come at the same time."""
    _check_quota(ticket, hub)
    hub.store.mark_lfs(ticket.repo_id, ticket.sha256)


@router.post(_UPLOADS)
def finish_parts(request: schemas.LfsParts, ticket: Ticket, hub: HubHere) -> None:
    """All parts are here: check the whole, and make it visible."""
    count = ceil(ticket.size_bytes / hub.quotas.limits.part_bytes)
    if not ticket.spool or ticket.part or [part.part_number for part in request.parts] != list(range(1, count + 1)):
        raise UploadMismatch(f"the object has {count} parts; name each once, in order.")
    try:
        hub.store.objects.finish_parts(ticket.spool, sha256=ticket.sha256, size_bytes=ticket.size_bytes)
    except UploadEnded:
        # Asked again by a client that did not hear our answer; a proxy may have been quicker than our check.
        if not hub.store.has_lfs(ticket.repo_id, ticket.sha256):
            raise
    _mark(ticket, hub)


@router.post(FILES + ".git/info/lfs/verify")
def verify_object(request: schemas.LfsObject, repo: Contributable, hub: HubHere) -> None:
    """200 when the object is here with that size."""
    entry = hub.store.lfs_entry(repo.repo_id, request.oid)
    if entry.size != request.size:
        raise UploadMismatch(f"the object {request.oid} has {entry.size} bytes here, not {request.size}.")
