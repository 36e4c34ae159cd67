"""Dependencies of the routes: the services, the caller, and the repository in the path with the access checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Query, Request
from pydantic import AfterValidator
from starlette.convertors import IntegerConvertor, StringConvertor, register_url_convertor

from adapterhub.hubserver.auth.tickets import Signer
from adapterhub.hubserver.auth.tokens import Account, Tokens
from adapterhub.hubserver.errors import (
    AccessNeedsToken,
    AccessNotGranted,
    InvalidToken,
    RepoNeedsToken,
    RepoNotFound,
    TokenRequired,
    WriteForbidden,
)
from adapterhub.hubserver.names import MAX_NUMBER, RepoId
from adapterhub.hubserver.storage.catalog import RepoCatalog
from adapterhub.hubserver.storage.discussion_store import DiscussionStore
from adapterhub.hubserver.storage.quotas import Quotas
from adapterhub.hubserver.storage.store import HubStore, Repo
from adapterhub.hubserver.xet.xorb_store import XorbStore

READ = ["GET", "HEAD"]
"""Methods of a route that only reads: clients send HEAD to every address that they GET."""


class _Kinds(StringConvertor):
    regex = "models|datasets"


class _Prefix(StringConvertor):
    regex = "(?:datasets/)?"


class _Number(IntegerConvertor):
    # As many digits as MAX_NUMBER; a longer number cannot exist.
    regex = "[0-9]{1,9}"


register_url_convertor("kinds", _Kinds())
register_url_convertor("number", _Number())
register_url_convertor("prefix", _Prefix())

REPO = "/api/{kinds:kinds}/{namespace}/{name}"
"""Prefix of the API routes of a repository."""
FILES = "/{prefix:prefix}{namespace}/{name}"
"""Prefix of the routes of a repository's files and pages."""


def _decoded(part: str) -> str:
    return unquote(part, errors="strict")


PageNumber = Annotated[int, Query(ge=0, le=MAX_NUMBER)]
"""Page number, from 0."""

PathSegment = Annotated[str, AfterValidator(_decoded)]
"""One decoded segment of the path; routing uses the raw path, so a branch `a/b` (`a%2Fb`) is one segment."""


@dataclass(frozen=True)
class HubServices:
    """The services that the routes use, created once by the application factory."""

    store: HubStore
    catalog: RepoCatalog
    discussions: DiscussionStore
    quotas: Quotas
    xet: XorbStore
    tokens: Tokens
    signer: Signer
    public_url: str | None
    """The server's URL as clients see it, if a proxy stands in front."""


def _hub(request: Request) -> HubServices:
    hub: HubServices = request.app.state.hub
    return hub


HubDep = Annotated[HubServices, Depends(_hub)]


def _caller(request: Request, hub: HubDep) -> Account | None:
    caller = _account(request, hub)
    request.state.user = caller.user if caller is not None else None
    return caller


def _account(request: Request, hub: HubServices) -> Account | None:
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidToken
    return hub.tokens.account(token.strip())


Caller = Annotated[Account | None, Depends(_caller)]
"""The account of the request's token; None without a token."""


def _user(caller: Caller) -> Account:
    if caller is None:
        raise TokenRequired(
            "the request has no token: send 'Authorization: Bearer ...' (most clients read it from HF_TOKEN)."
        )
    return caller


User = Annotated[Account, Depends(_user)]


def _base_url(request: Request, hub: HubDep) -> str:
    return (hub.public_url or str(request.base_url)).rstrip("/")


BaseUrl = Annotated[str, Depends(_base_url)]


def can_see(caller: Account | None, repo: Repo) -> bool:
    """Return whether the caller can see the repository: always, unless it is private."""
    return not repo.private or (caller is not None and caller.is_member_of(repo.repo_id.namespace))


def can_read_files(caller: Account | None, repo: Repo) -> bool:
    """Return whether a caller who can see the repository can also read its files: always, unless it is gated."""
    if repo.gated is None or (caller is not None and caller.is_member_of(repo.repo_id.namespace)):
        return True
    request = repo.access.get(caller.user) if caller is not None else None
    return request is not None and request.status == "accepted"


def check_can_write(user: Account, namespace: str) -> None:
    """Check that the account can write to repositories of `namespace`. Raises WriteForbidden."""
    check_is_writer(user)
    if not user.can_write(namespace):
        raise WriteForbidden(
            f"'{user.user}' cannot write to repositories of '{namespace}': ask the hub's administrator."
        )


def check_is_writer(user: Account) -> None:
    """Check that the token's role allows writing. Raises WriteForbidden."""
    if not user.is_writer:
        raise WriteForbidden(f"the token of '{user.user}' is read-only: use a token with the role 'write'.")


def find_repo(hub: HubServices, caller: Account | None, *, repo_id: RepoId) -> Repo:
    """Return the repository if the caller can see it. Raises RepoNotFound, or RepoNeedsToken without a token.

    A private repository and one that does not exist give the same error.
    """
    try:
        repo = hub.store.repo(repo_id)
    except RepoNotFound:
        repo = None
    if repo is not None and can_see(caller, repo):
        return repo
    if caller is None:
        raise RepoNeedsToken(f"no public repository {repo_id} on this hub: send a token if it is private.")
    raise RepoNotFound(f"no repository {repo_id} on this hub that '{caller.user}' can see: check the name.")


def _addressed(request: Request, namespace: PathSegment, name: PathSegment) -> RepoId:
    kinds = request.path_params.get("kinds") or request.path_params.get("prefix") or ""
    return RepoId(namespace, name, "dataset" if kinds.startswith("datasets") else "model")


AddressedRepo = Annotated[RepoId, Depends(_addressed)]
"""The repository id in the path, whether or not the repository exists."""


def _visible(repo_id: AddressedRepo, hub: HubDep, caller: Caller) -> Repo:
    return find_repo(hub, caller, repo_id=repo_id)


VisibleRepo = Annotated[Repo, Depends(_visible)]
"""The repository in the path, if the caller can see it and the names of its files."""


def _readable(repo: VisibleRepo, caller: Caller) -> Repo:
    if can_read_files(caller, repo):
        return repo
    if caller is None:
        raise AccessNeedsToken(f"{repo.id} is gated: send the token of a user who was granted access.")
    raise AccessNotGranted(
        f"{repo.id} is gated and '{caller.user}' has not been granted access: request it with "
        f"POST /{repo.id}/ask-access, or ask the owner."
    )


ReadableRepo = Annotated[Repo, Depends(_readable)]
"""The repository in the path, if the caller can read its files."""


def _contributable(repo: ReadableRepo, user: User) -> Repo:
    check_is_writer(user)
    return repo


ContributableRepo = Annotated[Repo, Depends(_contributable)]
"""The repository in the path, if the caller can open pull requests."""


def _writable(repo: VisibleRepo, user: User) -> Repo:
    check_can_write(user, repo.repo_id.namespace)
    return repo


WritableRepo = Annotated[Repo, Depends(_writable)]
"""The repository in the path, if the caller can write to it."""
