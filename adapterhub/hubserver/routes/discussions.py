"""Routes of discussions and pull requests; commits to a pull request go through `routes.commits`."""

from __future__ import annotations

from fastapi import APIRouter

from adapterhub.hubserver.auth.tokens import Account
from adapterhub.hubserver.routes.dependencies import (
    READ,
    REPO,
    Caller,
    ContributableRepo,
    HubDep,
    HubServices,
    PageNumber,
    User,
    VisibleRepo,
    WritableRepo,
    can_read_files,
    check_can_write,
)
from adapterhub.hubserver.schemas import community
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.discussion import Discussion, Event
from adapterhub.hubserver.storage.store import Repo

router = APIRouter()
_PAGE_SIZE = 50
_DISCUSSION = REPO + "/discussions/{num:number}"


@router.api_route(REPO + "/discussions", methods=READ)
def list_discussions(
    repo: VisibleRepo,
    hub: HubDep,
    p: PageNumber = 0,
    type: str = "all",
    status: str = "all",
    author: str | None = None,
) -> community.DiscussionPage:
    """Return one page of the discussions of a repository, newest first."""
    found = [
        one
        for one in hub.discussions.all(repo)
        if type in ("all", "pull_request" if one.is_pull else "discussion")
        and (status == "all" or (status == "open") == (one.status in ("open", "draft")))
        and author in (None, one.author)
    ]
    start = p * _PAGE_SIZE
    page = [_reply(repo, one) for one in found[start : start + _PAGE_SIZE]]
    return community.DiscussionPage(count=len(found), start=start, discussions=page)


@router.post(REPO + "/discussions")
def open_discussion(
    request: community.NewDiscussion, repo: ContributableRepo, user: User, hub: HubDep
) -> community.DiscussionReply:
    """Open a discussion or a pull request."""
    opened = hub.discussions.open(
        repo.repo_id,
        author=user.user,
        title=request.title,
        description=request.description,
        is_pull=request.pull_request,
    )
    return _reply(repo, opened)


# Clients read `changes` of pull requests only, and treat a `diff` of null as no diff.
@router.api_route(_DISCUSSION, methods=READ)
def show_discussion(repo: VisibleRepo, num: int, hub: HubDep, caller: Caller) -> community.DiscussionDetails:
    """Return a discussion with its events, and of a pull request the changes."""
    one = hub.discussions.get(repo, num)
    details = community.DiscussionDetails(
        **_reply(repo, one).model_dump(), events=[_event_reply(event) for event in _events(hub, repo, one)]
    )
    if one.base is None:
        return details
    # The base branch may have been deleted.
    can_merge = one.status in ("open", "draft") and one.base in repo.branches
    return details.model_copy(
        update={
            "changes": community.PullChanges(base=f"refs/heads/{one.base}", merge_commit_id=one.merge_commit),
            "files_with_conflicts": hub.discussions.conflicts(repo, one) if can_merge else [],
            "diff": hub.discussions.diff(repo, one) if can_read_files(caller, repo) else None,
        }
    )


@router.post(_DISCUSSION + "/comment")
def comment(
    request: community.NewComment, repo: ContributableRepo, num: int, user: User, hub: HubDep
) -> community.NewMessageReply:
    """Add a comment."""
    event = hub.discussions.comment(repo.repo_id, num, text=request.comment, author=user.user)
    return community.NewMessageReply(new_message=_event_reply(event))


@router.post(_DISCUSSION + "/comment/{event_id}/edit")
def edit_comment(
    request: community.EditedComment, repo: ContributableRepo, num: int, event_id: str, user: User, hub: HubDep
) -> community.UpdatedCommentReply:
    """Change the text of the caller's own comment."""
    event = hub.discussions.edit_comment(repo.repo_id, num, event_id=event_id, text=request.content, author=user.user)
    return community.UpdatedCommentReply(updated_comment=_event_reply(event))


@router.post(_DISCUSSION + "/comment/{event_id}/hide")
def hide_comment(
    repo: ContributableRepo, num: int, event_id: str, user: User, hub: HubDep
) -> community.UpdatedCommentReply:
    """Delete the text of the caller's own comment."""
    event = hub.discussions.edit_comment(repo.repo_id, num, event_id=event_id, text=None, author=user.user)
    return community.UpdatedCommentReply(updated_comment=_event_reply(event))


@router.post(_DISCUSSION + "/title")
def rename(
    request: community.NewTitle, repo: ContributableRepo, num: int, user: User, hub: HubDep
) -> community.NewTitleReply:
    """Change the title."""
    _check_is_author_or_writer(hub, repo, num, user)
    event = hub.discussions.rename(repo.repo_id, num, title=request.title, author=user.user)
    return community.NewTitleReply(new_title=_event_reply(event))


@router.post(_DISCUSSION + "/status")
def set_status(
    request: community.NewStatus, repo: ContributableRepo, num: int, user: User, hub: HubDep
) -> community.NewStatusReply:
    """Open or close a discussion, with an optional comment."""
    _check_is_author_or_writer(hub, repo, num, user)
    event = hub.discussions.set_status(
        repo.repo_id, num, status=request.status, author=user.user, comment=request.comment
    )
    return community.NewStatusReply(new_status=_event_reply(event))


@router.post(_DISCUSSION + "/merge")
def merge(repo: WritableRepo, num: int, user: User, hub: HubDep, request: community.MergeRequest | None = None) -> None:
    """Merge a pull request, with an optional comment."""
    hub.discussions.merge(repo.repo_id, num, author=user.user)
    if request is not None and request.comment:
        hub.discussions.comment(repo.repo_id, num, text=request.comment, author=user.user)


def _check_is_author_or_writer(hub: HubServices, repo: Repo, num: int, user: Account) -> None:
    if hub.discussions.get(repo, num).author != user.user:
        check_can_write(user, repo.repo_id.namespace)


def _reply(repo: Repo, one: Discussion) -> community.DiscussionReply:
    return community.DiscussionReply(
        num=one.num,
        title=one.title,
        author=community.Person(name=one.author),
        created_at=schemas.iso_time(one.created_s),
        status=one.status,
        is_pull_request=one.is_pull,
        repo=community.DiscussionRepo(name=repo.repo_id.full_name, type=repo.repo_id.kind),
    )


def _events(hub: HubServices, repo: Repo, one: Discussion) -> list[Event]:
    """Return the events, with the merge, which is stored with the repository and not as an event."""
    if one.merge_commit is None:
        return list(one.events)
    commit = hub.store.commit_at(repo, one.merge_commit)
    merged = Event(
        id=commit.sha[:24],
        type="status-change",
        author=commit.author,
        time_s=commit.time_s,
        data={"status": "merged"},
    )
    return sorted([*one.events, merged], key=lambda event: event.time_s)


def _event_reply(event: Event) -> community.EventReply:
    data = event.data
    if event.type == "comment":
        latest = {"raw": data["text"], "html": "", "updatedAt": schemas.iso_time(event.time_s)}
        data = {"edited": data["edited"], "hidden": data["hidden"], "latest": latest, "history": []}
    return community.EventReply(
        id=event.id,
        type=event.type,
        created_at=schemas.iso_time(event.time_s),
        author=community.Person(name=event.author),
        data=data,
    )
