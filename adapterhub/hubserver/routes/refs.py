"""Routes of branches, tags and commits, and of rewriting history."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from adapterhub.hubserver.routes.dependencies import (
    READ,
    REPO,
    BaseUrl,
    HubDep,
    HubServices,
    PageNumber,
    PathSegment,
    User,
    VisibleRepo,
    WritableRepo,
)
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.commit import RepoCommit
from adapterhub.hubserver.storage.history import remove_objects, squash
from adapterhub.hubserver.storage.pages import pages_of
from adapterhub.hubserver.storage.store import DEFAULT_BRANCH, Repo

router = APIRouter()
_MAX_COMMITS = 1000


@router.api_route(REPO + "/refs", methods=READ)
def list_refs(repo: VisibleRepo, hub: HubDep, include_prs: bool = False) -> schemas.Refs:
    """Return all branches and tags, and pull requests if `include_prs`."""
    pulls = [one for one in hub.discussions.all(repo) if one.is_pull] if include_prs else []
    return schemas.Refs(
        branches=[_ref("heads", name, sha) for name, sha in repo.branches.items()],
        tags=[_ref("tags", name, sha) for name, sha in repo.tags.items()],
        pull_requests=[_ref("pr", str(one.num), one.head) for one in pulls if one.head is not None],
    )


def _ref(kind: str, name: str, sha: str) -> schemas.Ref:
    return schemas.Ref(name=name, ref=f"refs/{kind}/{name}", target_commit=sha)


@router.api_route(REPO + "/commits/{revision}", methods=READ)
def list_commits(
    request: Request,
    response: Response,
    repo: VisibleRepo,
    revision: PathSegment,
    hub: HubDep,
    base_url: BaseUrl,
    p: PageNumber = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_COMMITS)] = _MAX_COMMITS,
) -> list[schemas.CommitItem]:
    """Return one page of the commits of a revision, newest first."""
    page = list(islice(hub.store.history(repo, revision), p * limit, (p + 1) * limit + 1))
    if len(page) > limit:
        address = request.url.include_query_params(p=p + 1)
        response.headers["Link"] = f'<{base_url}{address.path}?{address.query}>; rel="next"'
    return [_commit_item(commit) for commit in page[:limit]]


def _commit_item(commit: RepoCommit) -> schemas.CommitItem:
    return schemas.CommitItem(
        id=commit.sha,
        title=commit.title,
        message=commit.description,
        date=schemas.iso_time(commit.time_s),
        authors=[schemas.CommitAuthor(user=commit.author)],
        formatted=schemas.FormattedCommit(title=commit.title, message=commit.description),
    )


@router.post(REPO + "/branch/{branch}")
def create_branch(request: schemas.NewBranch, repo: WritableRepo, branch: PathSegment, hub: HubDep) -> None:
    """Create a branch."""
    hub.store.create_branch(repo.repo_id, branch, start=request.starting_point or DEFAULT_BRANCH)


@router.delete(REPO + "/branch/{branch}")
def delete_branch(repo: WritableRepo, branch: PathSegment, hub: HubDep) -> None:
    """Delete a branch."""
    hub.store.delete_branch(repo.repo_id, branch)


@router.post(REPO + "/tag/{revision}")
def create_tag(request: schemas.NewTag, repo: WritableRepo, revision: PathSegment, hub: HubDep) -> None:
    """Create a tag."""
    hub.store.create_tag(repo.repo_id, request.tag, target=revision)


@router.delete(REPO + "/tag/{tag}")
def delete_tag(repo: WritableRepo, tag: PathSegment, hub: HubDep) -> None:
    """Delete a tag."""
    hub.store.delete_tag(repo.repo_id, tag)


@router.post(REPO + "/super-squash/{branch}")
def super_squash(
    request: schemas.SquashBranch, repo: WritableRepo, branch: PathSegment, user: User, hub: HubDep
) -> None:
    """Replace the history of a branch by one commit."""
    squash(hub.store, repo.repo_id, branch, author=user.user, message=request.message)


@router.api_route(REPO + "/lfs-files", methods=READ)
def list_lfs_files(repo: WritableRepo, hub: HubDep) -> list[schemas.LfsFile]:
    """Return all large objects of the repository, including older commits, each with its most recent file name."""
    names: dict[str, tuple[str, str, str]] = {}
    pages: set[str] = set()
    for kind, refs in (("heads", repo.branches), ("tags", repo.tags)):
        for ref, sha in refs.items():
            _note_names(hub, repo, sha, f"refs/{kind}/{ref}", names, pages)
    files = []
    for sha256, (size, time_s) in hub.store.lfs_marks(repo.repo_id).items():
        path, blob, ref = names.get(sha256, ("", "", ""))
        pushed = schemas.iso_time(int(time_s))
        files.append(
            schemas.LfsFile(file_oid=sha256, filename=path, oid=blob, pushed_at=pushed, ref=ref or None, size=size)
        )
    return files


def _note_names(
    hub: HubServices, repo: Repo, sha: str, ref: str, names: dict[str, tuple[str, str, str]], pages: set[str]
) -> None:
    """Add the newest name of each object to `names`, from the pages that are not in `pages` yet."""
    for commit in hub.store.history(repo, sha):
        for page_id, entries in pages_of(commit):
            if page_id in pages:
                continue
            pages.add(page_id)
            for path, entry in entries.items():
                if entry.sha256 is not None:
                    names.setdefault(entry.sha256, (path, entry.blob, ref))


@router.post(REPO + "/lfs-files/batch")
def delete_lfs_files(request: schemas.LfsFilesBatch, repo: WritableRepo, hub: HubDep) -> None:
    """Permanently delete large objects from the repository; `adapterhub hub gc` then frees the disk space."""
    deletions = request.deletions
    remove_objects(hub.store, repo.repo_id, deletions.sha, is_rewriting=deletions.rewrite_history)
