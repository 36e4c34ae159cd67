"""Who may see and change what, as dependencies of the routes. Knows no request or reply shapes."""

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
    AccessNotGranted,
    AccessNotGrantedToAnybody,
    InvalidToken,
    LoginNeeded,
    NoWriteRight,
    RepoHidden,
    RepoMissing,
)
from adapterhub.hubserver.names import MAX_NUMBER, RepoId
from adapterhub.hubserver.storage.catalog import Catalog
from adapterhub.hubserver.storage.discussions import Discussions
from adapterhub.hubserver.storage.quotas import Quotas
from adapterhub.hubserver.storage.store import HubStore, Repo
from adapterhub.hubserver.xet.store import XetStore

READ = ["GET", "HEAD"]
"""Mirrors ask HEAD of every page they GET."""


class _Kinds(StringConvertor):
    regex = "models|datasets"


class _Prefix(StringConvertor):
    regex = "(?:datasets/)?"


class _Number(IntegerConvertor):
    # As many digits as MAX_NUMBER has; longer ones name nothing.
    regex = "[0-9]{1,9}"


register_url_convertor("kinds", _Kinds())
register_url_convertor("number", _Number())
register_url_convertor("prefix", _Prefix())

REPO = "/api/{kinds:kinds}/{namespace}/{name}"
"""How the address of everything about a repository begins."""
FILES = "/{prefix:prefix}{namespace}/{name}"
"""How the address of its files and pages begins."""


def _decoded(part: str) -> str:
    return unquote(part, errors="strict")


PageNumber = Annotated[int, Query(ge=0, le=MAX_NUMBER)]
"""counted from 0"""

Part = Annotated[str, AfterValidator(_decoded)]
"""One part of the path; routing happened on the raw path, so a branch `a/b` (`a%2Fb`) is one part."""


@dataclass(frozen=True)
class Hub:
    """Everything the routes need, made once by the app factory."""

    store: HubStore
    catalog: Catalog
    discussions: Discussions
    quotas: Quotas
    xet: XetStore
    tokens: Tokens
    signer: Signer
    public_url: str | None
    """the address clients use, when a proxy stands before us"""


def _hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


HubHere = Annotated[Hub, Depends(_hub)]


def _caller(request: Request, hub: HubHere) -> Account | None:
    caller = _account(request, hub)
    request.state.user = caller.user if caller is not None else None
    return caller


def _account(request: Request, hub: Hub) -> Account | None:
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidToken
    return hub.tokens.account(token.strip())


Caller = Annotated[Account | None, Depends(_caller)]
"""None: no token was sent"""


def _user(caller: Caller) -> Account:
    if caller is None:
        raise LoginNeeded("this needs a token: send 'Authorization: Bearer ...' (HF_TOKEN for most clients).")
    return caller


User = Annotated[Account, Depends(_user)]


def _base_url(request: Request, hub: HubHere) -> str:
    return (hub.public_url or str(request.base_url)).rstrip("/")


BaseUrl = Annotated[str, Depends(_base_url)]


def can_see(caller: Account | None, repo: Repo) -> bool:
    return not repo.private or (caller is not None and caller.is_member_of(repo.repo_id.namespace))


def can_read_files(caller: Account | None, repo: Repo) -> bool:
    """Whether somebody who sees the repository may have its files: all may, unless it is gated."""
    if repo.gated is None or (caller is not None and caller.is_member_of(repo.repo_id.namespace)):
        return True
    request = repo.access.get(caller.user) if caller is not None else None
    return request is not None and request.status == "accepted"


def check_can_write(user: Account, namespace: str) -> None:
    """Raises NoWriteRight."""
    check_is_writer(user)
    if not user.can_write(namespace):
        raise NoWriteRight(f"'{user.user}' may not write below '{namespace}/'.")


def check_is_writer(user: Account) -> None:
    """Raises NoWriteRight for a token that only reads."""
    if not user.is_writer:
        raise NoWriteRight(f"the token of '{user.user}' can only read; this needs one with the role 'write'.")


def find_repo(hub: Hub, caller: Account | None, *, repo_id: RepoId) -> Repo:
    """The repository, if there is one for this caller. Raises RepoMissing, or RepoHidden for callers without a token.

    A hidden repository and a missing one give the same answer.
    """
    try:
        repo = hub.store.repo(repo_id)
    except RepoMissing:
        repo = None
    if repo is not None and can_see(caller, repo):
        return repo
    if caller is None:
        raise RepoHidden(f"no public repository {repo_id} here; if it is private, send a token.")
    raise RepoMissing(f"no repository {repo_id} here that '{caller.user}' can see.")


def _addressed(request: Request, namespace: Part, name: Part) -> RepoId:
    kinds = request.path_params.get("kinds") or request.path_params.get("prefix") or ""
    return RepoId(namespace, name, "dataset" if kinds.startswith("datasets") else "model")


AddressedRepo = Annotated[RepoId, Depends(_addressed)]
"""The name in the path, whether or not there is such a repository"""


def _visible(repo_id: AddressedRepo, hub: HubHere, caller: Caller) -> Repo:
    return find_repo(hub, caller, repo_id=repo_id)


Visible = Annotated[Repo, Depends(_visible)]
"""The repository in the path; the caller may know of it, and of its files' names"""


def _readable(repo: Visible, caller: Caller) -> Repo:
    if can_read_files(caller, repo):
        return repo
    if caller is None:
        raise AccessNotGrantedToAnybody(f"{repo.id} is gated: send a token of somebody who was granted access.")
    raise AccessNotGranted(
        f"{repo.id} is gated and '{caller.user}' has not been granted access: ask for it with "
        f"POST /{repo.id}/ask-access, or ask its owner."
    )


Readable = Annotated[Repo, Depends(_readable)]
"""The repository in the path; the caller may have its files"""


def _contributable(repo: Readable, user: User) -> Repo:
    check_is_writer(user)
    return repo


Contributable = Annotated[Repo, Depends(_contributable)]
"""The repository in the path; the caller may propose changes to it"""


def _writable(repo: Visible, user: User) -> Repo:
    check_can_write(user, repo.repo_id.namespace)
    return repo


Writable = Annotated[Repo, Depends(_writable)]
"""The repository in the path; the caller may change it"""
