"""Routes about users and repositories as a whole: who am I, make, find, describe, name versions.

Touches no file bytes.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from adapterhub.hubserver import wire
from adapterhub.hubserver.access import (
    READ,
    BaseUrl,
    Caller,
    Hub,
    HubHere,
    Part,
    Readable,
    User,
    Writable,
    can_see,
    check_can_write,
    find_repo,
)
from adapterhub.hubserver.auth import ANY_NAMESPACE, Account
from adapterhub.hubserver.cards import parse_card
from adapterhub.hubserver.catalog import MAX_PAGE, sibling_details, sibling_names
from adapterhub.hubserver.catalog import Query as ModelQuery
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.refusals import AlreadyExists, BadCard, Refusal, RepoHidden, RepoMissing
from adapterhub.hubserver.store import DEFAULT_BRANCH, Repo

router = APIRouter()


@router.get("/api/whoami-v2")
def whoami(user: User) -> wire.Whoami:
    token = wire.AccessToken(display_name="token", role=user.role)
    return wire.Whoami(
        name=user.user,
        fullname=user.user,
        orgs=[wire.OrgReply(name=name) for name in user.namespaces if name != ANY_NAMESPACE],
        auth=wire.WhoamiAuth(access_token=token),
    )


def _named(request: wire.RepoName, user: Account) -> RepoId:
    if request.type not in (None, "model"):
        raise Refusal(f"this hub holds models only, no {request.type!r} repositories.")
    return RepoId(request.organization or user.user, request.name)


@router.post("/api/repos/create", response_model=wire.RepoUrl)
def create_repo(request: wire.CreateRepo, user: User, hub: HubHere, base_url: BaseUrl) -> wire.RepoUrl | JSONResponse:
    repo_id = _named(request, user)
    check_can_write(user, repo_id.namespace)
    reply = wire.RepoUrl(url=f"{base_url}/{repo_id}", name=str(repo_id))
    private = request.visibility == "private" or request.private
    try:
        hub.store.create_repo(repo_id, author=user.user, private=private)
    except AlreadyExists as error:
        # `exist_ok` reads the address out of the refusal.
        return JSONResponse({"error": str(error), **reply.model_dump(by_alias=True)}, status_code=409)
    return reply


@router.delete("/api/repos/delete")
def delete_repo(request: wire.RepoName, user: User, hub: HubHere) -> None:
    repo = find_repo(hub, user, repo_id=_named(request, user))
    check_can_write(user, repo.repo_id.namespace)
    hub.store.delete_repo(repo.repo_id)


@router.put("/api/models/{namespace}/{name}/settings")
def change_settings(request: wire.Settings, repo: Writable, hub: HubHere) -> wire.SettingsReply:
    private = request.private if request.visibility is None else request.visibility == "private"
    if private is None:
        raise Refusal("the only setting here is visibility: 'public' or 'private'.")
    hub.store.set_private(repo.repo_id, private=private)
    return wire.SettingsReply(private=private)


@router.api_route("/api/models", methods=READ)
def list_models(
    request: Request,
    response: Response,
    hub: HubHere,
    caller: Caller,
    base_url: BaseUrl,
    filter: Annotated[list[str] | None, Query()] = None,
    author: str | None = None,
    search: str | None = None,
    pipeline_tag: str | None = None,
    sort: str | None = None,
    limit: Annotated[int, Query(ge=1)] = MAX_PAGE,
    skip: Annotated[int, Query(ge=0)] = 0,
    full: bool = False,
) -> list[wire.Model]:
    tags = (*(filter or ()), *(() if pipeline_tag is None else (pipeline_tag,)))
    query = ModelQuery(tags, author, search, sort, min(limit, MAX_PAGE), skip)
    page = hub.catalog.page(query, can_see=lambda repo: can_see(caller, repo))
    if page.next_skip is not None:
        kept = [(key, value) for key, value in request.query_params.multi_items() if key != "skip"]
        address = f"{base_url}/api/models?{urlencode([*kept, ('skip', str(page.next_skip))])}"
        response.headers["Link"] = f'<{address}>; rel="next"'
    return [
        hub.catalog.model(repo, commit, siblings=sibling_names(commit) if full else None)
        for repo, commit in page.models
    ]


def _describe(hub: Hub, repo: Repo, *, revision: str, has_blobs: bool) -> wire.Model:
    commit = hub.store.commit_at(repo, revision)
    siblings = sibling_details(commit) if has_blobs else sibling_names(commit)
    return hub.catalog.model(repo, commit, siblings=siblings)


@router.api_route("/api/models/{namespace}/{name}", methods=READ)
def model_info(repo: Readable, hub: HubHere, blobs: bool = False) -> wire.Model:
    return _describe(hub, repo, revision=DEFAULT_BRANCH, has_blobs=blobs)


@router.api_route("/api/models/{namespace}/{name}/revision/{revision}", methods=READ)
def model_info_at(repo: Readable, revision: Part, hub: HubHere, blobs: bool = False) -> wire.Model:
    return _describe(hub, repo, revision=revision, has_blobs=blobs)


@router.api_route("/api/models/{namespace}/{name}/auth-check", methods=READ)
def check_readable(repo: Readable) -> None:
    """200 when the caller may see the repository."""


@router.api_route("/api/models/{namespace}/{name}/auth-check/write", methods=READ)
def check_writable(repo: Writable) -> None:
    """200 when the caller may change the repository."""


@router.api_route("/api/models/{namespace}/{name}/refs", methods=READ)
def list_refs(repo: Readable) -> wire.Refs:
    return wire.Refs(
        branches=[_ref("heads", name, sha) for name, sha in repo.branches.items()],
        tags=[_ref("tags", name, sha) for name, sha in repo.tags.items()],
    )


def _ref(kind: str, name: str, sha: str) -> wire.Ref:
    return wire.Ref(name=name, ref=f"refs/{kind}/{name}", target_commit=sha)


@router.api_route("/api/models/{namespace}/{name}/commits/{revision}", methods=READ)
def list_commits(repo: Readable, revision: Part, hub: HubHere) -> list[wire.CommitItem]:
    return [
        wire.CommitItem(
            id=commit.sha,
            title=commit.title,
            message=commit.description,
            date=wire.iso_time(commit.time_s),
            authors=[wire.CommitAuthor(user=commit.author)],
        )
        for commit in hub.store.history(repo, revision)
    ]


@router.post("/api/models/{namespace}/{name}/branch/{branch}")
def create_branch(request: wire.NewBranch, repo: Writable, branch: Part, hub: HubHere) -> None:
    hub.store.create_branch(repo.repo_id, branch, start=request.starting_point or DEFAULT_BRANCH)


@router.delete("/api/models/{namespace}/{name}/branch/{branch}")
def delete_branch(repo: Writable, branch: Part, hub: HubHere) -> None:
    hub.store.delete_branch(repo.repo_id, branch)


@router.post("/api/models/{namespace}/{name}/tag/{revision}")
def create_tag(request: wire.NewTag, repo: Writable, revision: Part, hub: HubHere) -> None:
    hub.store.create_tag(repo.repo_id, request.tag, target=revision)


@router.delete("/api/models/{namespace}/{name}/tag/{tag}")
def delete_tag(repo: Writable, tag: Part, hub: HubHere) -> None:
    hub.store.delete_tag(repo.repo_id, tag)


@router.post("/api/validate-yaml")
def validate_card(request: wire.Card, response: Response) -> wire.CardReport:
    try:
        parse_card(request.content)
    except BadCard as error:
        response.status_code = error.http_status
        return wire.CardReport(errors=[wire.CardFault(message=str(error))])
    return wire.CardReport()


@router.api_route("/api/models/{name}", methods=READ)
@router.api_route("/{name}/resolve/{rest:path}", methods=READ)
def one_word_name(name: Part, caller: Caller) -> None:
    """The public Hub has a few models without an owner (`gpt2`); here there are none."""
    message = f"no repository {name!r} here; names have the form owner/name."
    raise RepoHidden(message) if caller is None else RepoMissing(message)


@router.api_route("/api/datasets/{rest:path}", methods=READ)
@router.api_route("/api/spaces/{rest:path}", methods=READ)
@router.api_route("/datasets/{rest:path}", methods=READ)
@router.api_route("/spaces/{rest:path}", methods=READ)
def other_kinds() -> None:
    """Nothing but models is kept here."""
    raise RepoMissing("this hub holds models only: no data sets and no spaces.")
