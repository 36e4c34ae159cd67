"""Routes of the Xet upload protocol: a token, xorbs (packed chunks) and shards (files as lists of chunks).

An uploaded file becomes an ordinary LFS object; downloads do not use Xet.
"""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from adapterhub.hubserver.auth.tickets import XET_LIFETIME_S, XetTicket
from adapterhub.hubserver.errors import InvalidToken
from adapterhub.hubserver.names import PULL_PREFIX
from adapterhub.hubserver.routes.bodies import stream_body
from adapterhub.hubserver.routes.dependencies import (
    READ,
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
from adapterhub.hubserver.storage.objects import Spool
from adapterhub.hubserver.xet.format import MAX_SHARD_BYTES, MAX_XORB_BYTES, shard_files, xorb_chunks

router = APIRouter()


@router.api_route(REPO + "/xet-write-token/{revision}", methods=READ)
def write_token(
    repo: ContributableRepo,
    revision: PathSegment,
    user: User,
    response: Response,
    hub: HubDep,
    base_url: BaseUrl,
    create_pr: str = "",
) -> schemas.XetToken:
    """Return the URL for chunks and a token for it, both in the headers and in the body."""
    if not create_pr and not revision.startswith(PULL_PREFIX):
        check_can_write(user, repo.repo_id.namespace)
    ticket = XetTicket(repo.repo_id, user.user, int(time.time()) + XET_LIFETIME_S)
    reply = schemas.XetToken(access_token=hub.signer.xet_token(ticket), exp=ticket.expires_s, cas_url=base_url)
    response.headers["X-Xet-Cas-Url"] = reply.cas_url
    response.headers["X-Xet-Access-Token"] = reply.access_token
    response.headers["X-Xet-Token-Expiration"] = str(reply.exp)
    return reply


def _ticket(request: Request, hub: HubDep) -> XetTicket:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidToken
    ticket = hub.signer.xet_ticket(token.strip())
    request.state.user = ticket.user
    return ticket


Ticket = Annotated[XetTicket, Depends(_ticket)]


@router.post("/v1/xorbs/default/{xorb}", max_body_size=MAX_XORB_BYTES)
async def receive_xorb(request: Request, xorb: PathSegment, ticket: Ticket, hub: HubDep) -> schemas.XorbReply:
    """Store a xorb for the files whose shards will name its chunks."""
    announced = int(request.headers.get("content-length", 0))
    await run_in_threadpool(hub.quotas.check, ticket.repo_id, added_bytes=announced)
    with contextlib.closing(hub.xet.begin_xorb(ticket.user, xorb)) as spool:
        await stream_body(request, spool.write)
        await run_in_threadpool(_publish_xorb, spool)
    return schemas.XorbReply(was_inserted=True)


def _publish_xorb(spool: Spool) -> None:
    xorb_chunks(spool.file)
    spool.publish()


@router.post("/v1/shards", max_body_size=MAX_SHARD_BYTES)
async def receive_shard(request: Request, ticket: Ticket, hub: HubDep) -> schemas.ShardReply:
    """Rebuild, check and store each file that a shard describes."""
    with contextlib.closing(hub.xet.begin_shard()) as spool:
        await stream_body(request, spool.write)
        await run_in_threadpool(_store_files, spool, ticket, hub)
    return schemas.ShardReply(result=1)


def _store_files(spool: Spool, ticket: XetTicket, hub: HubServices) -> None:
    hub.store.repo(ticket.repo_id)
    spool.file.seek(0)
    for file in shard_files(spool.file):
        # Clients send shards again; the repository has the file already.
        if hub.store.has_lfs(ticket.repo_id, file.sha256):
            continue
        hub.quotas.check(ticket.repo_id, added_bytes=file.size_bytes)
        hub.xet.rebuild(file, user=ticket.user)
        hub.store.mark_lfs(ticket.repo_id, file.sha256)
