"""Routes of users and repositories: whoami, create, delete, move, duplicate, settings, list and describe."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from adapterhub.hubserver.auth.tokens import ANY_NAMESPACE, Account
from adapterhub.hubserver.errors import (
    AlreadyExists,
    HubServerError,
    InvalidCard,
    RepoNeedsToken,
    RepoNotFound,
)
from adapterhub.hubserver.names import Kind, RepoId
from adapterhub.hubserver.routes.dependencies import (
    READ,
    REPO,
    BaseUrl,
    Caller,
    HubDep,
    HubServices,
    PathSegment,
    ReadableRepo,
    User,
    VisibleRepo,
    WritableRepo,
    can_see,
    check_can_write,
    find_repo,
)
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.cards import parse_card
from adapterhub.hubserver.storage.catalog import MAX_PAGE, RepoQuery, sibling_details, sibling_names
from adapterhub.hubserver.storage.store import DEFAULT_BRANCH, Repo

router = APIRouter()


@router.get("/api/whoami-v2")
def whoami(user: User) -> schemas.Whoami:
    """Return the token's user, its teams and the token's role."""
    token = schemas.AccessToken(display_name="token", role=user.role)
    return schemas.Whoami(
        name=user.user,
        fullname=user.user,
        orgs=[schemas.OrgReply(name=name) for name in user.namespaces if name != ANY_NAMESPACE],
        auth=schemas.WhoamiAuth(access_token=token),
    )


def _named(request: schemas.RepoName, user: Account) -> RepoId:
    return RepoId(request.organization or user.user, request.name, _kind(request.type))


def _kind(type: str | None) -> Kind:
    if type not in (None, "model", "dataset"):
        raise HubServerError(f"unsupported repository type {type!r}: this hub has models and data sets only.")
    return "dataset" if type == "dataset" else "model"


@router.post("/api/repos/create", response_model=schemas.RepoUrl)
def create_repo(
    request: schemas.CreateRepo, user: User, hub: HubDep, base_url: BaseUrl
) -> schemas.RepoUrl | JSONResponse:
    """Create a repository."""
    repo_id = _named(request, user)
    check_can_write(user, repo_id.namespace)
    reply = schemas.RepoUrl(url=f"{base_url}/{repo_id}", name=repo_id.full_name)
    private = request.visibility == "private" or request.private
    try:
        hub.store.create_repo(repo_id, author=user.user, private=private)
    except AlreadyExists as error:
        # Clients with `exist_ok` read the URL from the error response.
        return JSONResponse({"error": str(error), **reply.model_dump(by_alias=True)}, status_code=409)
    return reply


@router.delete("/api/repos/delete")
def delete_repo(request: schemas.RepoName, user: User, hub: HubDep) -> None:
    """Delete a repository."""
    repo = find_repo(hub, user, repo_id=_named(request, user))
    check_can_write(user, repo.repo_id.namespace)
    hub.store.delete_repo(repo.repo_id)


@router.post("/api/repos/move")
def move_repo(request: schemas.MoveRepo, user: User, hub: HubDep) -> None:
    """Change the name or owner of a repository."""
    source, target = (_parsed(name, _kind(request.type)) for name in (request.from_repo, request.to_repo))
    repo = find_repo(hub, user, repo_id=source)
    check_can_write(user, source.namespace)
    check_can_write(user, target.namespace)
    if target.namespace != source.namespace:
        hub.quotas.check_quota(target, added_bytes=hub.store.stored_bytes(repo))
    hub.store.move_repo(repo.repo_id, target)


def _parsed(full_name: str, kind: Kind) -> RepoId:
    namespace, _, name = full_name.partition("/")
    return RepoId(namespace, name, kind)


@router.post(REPO + "/duplicate", response_model=schemas.DuplicateReply)
def duplicate_repo(
    request: schemas.DuplicateRepo, repo: ReadableRepo, user: User, hub: HubDep, base_url: BaseUrl
) -> schemas.DuplicateReply | JSONResponse:
    """Copy a repository to another name."""
    target = _parsed(request.repository, repo.repo_id.kind)
    check_can_write(user, target.namespace)
    # A copy is private if the original is, unless the request sets the visibility.
    private = repo.private if request.visibility is None else request.visibility == "private"
    reply = schemas.DuplicateReply(url=f"{base_url}/{target}")
    try:
        hub.quotas.check_quota(target, added_bytes=hub.store.stored_bytes(repo))
        hub.store.duplicate_repo(repo.repo_id, target, private=private)
    except AlreadyExists as error:
        return JSONResponse({"error": str(error), **reply.model_dump(by_alias=True)}, status_code=409)
    return reply


@router.put(REPO + "/settings")
def change_settings(request: schemas.Settings, repo: WritableRepo, hub: HubDep) -> schemas.SettingsReply:
    """Change the visibility of a repository, and whether it is gated."""
    private = request.private if request.visibility is None else request.visibility == "private"
    changes: dict[str, object] = {} if private is None else {"private": private}
    if request.gated is not None:
        changes["gated"] = request.gated or None
    if not changes:
        raise HubServerError("the request sets nothing: expected visibility ('public' or 'private') or gated.")
    hub.store.change(repo.repo_id, **changes)
    changed = hub.store.repo(repo.repo_id)
    return schemas.SettingsReply(private=changed.private, gated=changed.gated or False)


@router.api_route("/api/{kinds:kinds}", methods=READ)
def list_models(
    kinds: str,
    request: Request,
    response: Response,
    hub: HubDep,
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
    gated: bool | None = None,
) -> list[schemas.Model]:
    """Return one page of the models or data sets that match the query and that the caller can see."""
    tags = (*(filter or ()), *(() if pipeline_tag is None else (pipeline_tag,)))
    kind: Kind = "dataset" if kinds == "datasets" else "model"
    query = RepoQuery(tags, author, search, sort, min(limit, MAX_PAGE), skip, kind, gated)
    page = hub.catalog.page(query, can_see=lambda repo: can_see(caller, repo))
    if page.next_skip is not None:
        kept = [(key, value) for key, value in request.query_params.multi_items() if key != "skip"]
        address = f"{base_url}/api/{kinds}?{urlencode([*kept, ('skip', str(page.next_skip))])}"
        response.headers["Link"] = f'<{address}>; rel="next"'
    return [
        hub.catalog.model(repo, commit, siblings=sibling_names(commit) if full else None)
        for repo, commit in page.models
    ]


def _describe(hub: HubServices, repo: Repo, *, revision: str, has_blobs: bool) -> schemas.Model:
    commit = hub.store.commit_at(repo, revision)
    siblings = sibling_details(commit) if has_blobs else sibling_names(commit)
    return hub.catalog.model(repo, commit, siblings=siblings)


@router.api_route(REPO, methods=READ)
def model_info(repo: VisibleRepo, hub: HubDep, blobs: bool = False) -> schemas.Model:
    """Return the description of a repository at its default branch."""
    return _describe(hub, repo, revision=DEFAULT_BRANCH, has_blobs=blobs)


@router.api_route(REPO + "/revision/{revision}", methods=READ)
def model_info_at(repo: VisibleRepo, revision: PathSegment, hub: HubDep, blobs: bool = False) -> schemas.Model:
    """Return the description of a repository at a revision."""
    return _describe(hub, repo, revision=revision, has_blobs=blobs)


@router.api_route(REPO + "/auth-check", methods=READ)
def check_readable(repo: ReadableRepo) -> None:
    """Answer 200 if the caller can read the repository's files."""


@router.api_route(REPO + "/auth-check/write", methods=READ)
def check_writable(repo: WritableRepo) -> None:
    """Answer 200 if the caller can write to the repository."""


@router.post("/api/validate-yaml")
def validate_card(request: schemas.Card, response: Response) -> schemas.CardReport:
    """Check the YAML header of a model card."""
    try:
        parse_card(request.content)
    except InvalidCard as error:
        response.status_code = error.http_status
        return schemas.CardReport(errors=[schemas.CardFault(message=str(error))])
    return schemas.CardReport()


@router.api_route("/api/{kinds:kinds}/{name}", methods=READ)
@router.api_route("/{name}/resolve/{rest:path}", methods=READ)
def one_word_name(name: PathSegment, caller: Caller) -> None:
    """Answer 404 to a name without an owner, such as `gpt2`: only the public Hub has such models."""
    message = f"no repository {name!r} on this hub: names have the form owner/name."
    raise RepoNeedsToken(message) if caller is None else RepoNotFound(message)


@router.api_route("/api/spaces/{rest:path}", methods=READ)
@router.api_route("/spaces/{rest:path}", methods=READ)
def other_kinds() -> None:
    """Answer 404 to every request for a Space: this hub runs no programs."""
    raise RepoNotFound("this hub has models and data sets only: no spaces.")
