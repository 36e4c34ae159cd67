"""Routes of gated repositories: access requests and their approval."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter

from adapterhub.hubserver.errors import HubServerError
from adapterhub.hubserver.names import check_namespace
from adapterhub.hubserver.routes.dependencies import FILES, READ, REPO, HubDep, User, VisibleRepo, WritableRepo
from adapterhub.hubserver.schemas import community
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.store import AccessStatus, Repo

router = APIRouter()


@router.post(FILES + "/ask-access")
def ask_access(repo: VisibleRepo, user: User, hub: HubDep) -> None:
    """Request access to the files; a repository gated as 'auto' grants it at once."""

    def decide_now(now: Repo) -> AccessStatus | None:
        _check_is_gated(now)
        if user.user in now.access:
            return None
        return "accepted" if now.gated == "auto" else "pending"

    hub.store.set_access(repo.repo_id, user.user, decide=decide_now)


@router.api_route(REPO + "/user-access-request/{status}", methods=READ)
def list_requests(repo: WritableRepo, status: Literal["pending", "accepted", "rejected"]) -> list[community.AccessItem]:
    """Return the access requests with a status."""
    return [
        community.AccessItem(
            user=community.AccessPerson(user=user, fullname=user),
            request_id=user,
            status=request.status,
            timestamp=schemas.iso_time(request.time_s),
        )
        for user, request in repo.access.items()
        if request.status == status
    ]


@router.post(REPO + "/user-access-request/grant")
def grant(request: community.AccessGrant, repo: WritableRepo, hub: HubDep) -> dict[str, bool]:
    """Grant access to a user, whether or not the user has requested it."""

    def decide_now(now: Repo) -> AccessStatus:
        _check_is_gated(now)
        known = now.access.get(request.user)
        if known is not None and known.status == "accepted":
            raise HubServerError(f"'{request.user}' already has access to {now.id}.")
        return "accepted"

    hub.store.set_access(repo.repo_id, check_namespace(request.user), decide=decide_now)
    return {"success": True}


@router.post(REPO + "/user-access-request/handle")
def decide(request: community.AccessDecision, repo: WritableRepo, hub: HubDep) -> None:
    """Change the status of a user's access request."""
    user = request.user or request.request_id or ""

    def decide_now(now: Repo) -> AccessStatus:
        _check_is_gated(now)
        if user not in now.access:
            raise HubServerError(f"'{user}' has not requested access to {now.id}: grant it directly instead.")
        return request.status

    hub.store.set_access(repo.repo_id, user, decide=decide_now)


def _check_is_gated(repo: Repo) -> None:
    if repo.gated is None:
        raise HubServerError(f"{repo.id} is not gated: everyone who can see it can read its files.")
