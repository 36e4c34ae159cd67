"""Who may see and change what, as dependencies of the routes. Knows no request or reply shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Request
from pydantic import AfterValidator

from adapterhub.hubserver.auth import Account, Tokens
from adapterhub.hubserver.catalog import Catalog
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.refusals import InvalidToken, LoginNeeded, NoWriteRight, RepoHidden, RepoMissing
from adapterhub.hubserver.store import HubStore, Repo
from adapterhub.hubserver.tickets import Signer
from adapterhub.hubserver.xet_store import XetStore

READ = ["GET", "HEAD"]
"""Mirrors ask HEAD of every page they GET."""


def _decoded(part: str) -> str:
    return unquote(part, errors="strict")


Part = Annotated[str, AfterValidator(_decoded)]
"""One part of the path; routing happened on the raw path, so a branch `a/b` (`a%2Fb`) is one part."""


@dataclass(frozen=True)
class Hub:
    """Everything the routes need, made once by the app factory."""

    store: HubStore
    catalog: Catalog
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


def check_can_write(user: Account, namespace: str) -> None:
    """Raises NoWriteRight."""
    if user.role != "write":
        raise NoWriteRight(f"the token of '{user.user}' can only read; this needs one with the role 'write'.")
    if not user.can_write(namespace):
        raise NoWriteRight(f"'{user.user}' may not write below '{namespace}/'.")


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


def _readable(namespace: Part, name: Part, hub: HubHere, caller: Caller) -> Repo:
    return find_repo(hub, caller, repo_id=RepoId(namespace, name))


Readable = Annotated[Repo, Depends(_readable)]
"""The repository in the path; the caller may see it"""


def _writable(repo: Readable, user: User) -> Repo:
    check_can_write(user, repo.repo_id.namespace)
    return repo


Writable = Annotated[Repo, Depends(_writable)]
"""The repository in the path; the caller may change it"""
