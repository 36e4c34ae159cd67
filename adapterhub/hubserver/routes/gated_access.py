"""Routes of gated repositories: who asked for the files, and who may have them."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter

from adapterhub.hubserver.errors import Refusal
from adapterhub.hubserver.names import check_namespace
from adapterhub.hubserver.routes.dependencies import FILES, READ, REPO, HubHere, User, Visible, Writable
from adapterhub.hubserver.schemas import discussions as discussion_schemas
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.store import Repo

router = APIRouter()


@router.post(FILES + "/ask-access")
def ask_access(repo: Visible, user: User, hub: HubHere) -> None:
    """Ask for the files; where the gate is automatic, one gets them."""
    _check_is_gated(repo)
    if user.user not in repo.access:
        status: Literal["accepted", "pending"] = "accepted" if repo.gated == "auto" else "pending"
        hub.store.set_access(repo.repo_id, user.user, status=status)


@router.api_route(REPO + "/user-access-request/{status}", methods=READ)
def list_requests(
    repo: Writable, status: Literal["pending", "accepted", "rejected"]
) -> list[discussion_schemas.AccessItem]:
    return [
        discussion_schemas.AccessItem(
            user=discussion_schemas.AccessPerson(user=user, fullname=user),
            request_id=user,
            status=request.status,
            timestamp=schemas.iso_time(request.time_s),
        )
        for user, request in repo.access.items()
        if request.status == status
    ]


@router.post(REPO + "/user-access-request/grant")
def grant(request: discussion_schemas.AccessGrant, repo: Writable, hub: HubHere) -> dict[str, bool]:
    _check_is_gated(repo)
    known = repo.access.get(request.user)
    if known is not None and known.status == "accepted":
        raise Refusal(f"'{request.user}' has access to {repo.id} already.")
    hub.store.set_access(repo.repo_id, check_namespace(request.user), status="accepted")
    return {"success": True}


@router.post(REPO + "/user-access-request/handle")
def decide(request: discussion_schemas.AccessDecision, repo: Writable, hub: HubHere) -> None:
    _check_is_gated(repo)
    user = request.user or request.request_id
    if user is None or user not in repo.access:
        raise Refusal(f"'{user}' did not ask for access to {repo.id}.")
    hub.store.set_access(repo.repo_id, user, status=request.status)


def _check_is_gated(repo: Repo) -> None:
    if repo.gated is None:
        raise Refusal(f"{repo.id} is not gated: everybody who sees it may have its files.")
