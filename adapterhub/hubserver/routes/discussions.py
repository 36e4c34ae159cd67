"""Routes of discussions and pull requests. Commits to a pull request come in through `routes_uploads`."""

from __future__ import annotations

from fastapi import APIRouter

from adapterhub.hubserver.auth.tokens import Account
from adapterhub.hubserver.routes.dependencies import (
    READ,
    REPO,
    Caller,
    Contributable,
    Hub,
    HubHere,
    PageNumber,
    User,
    Visible,
    Writable,
    can_read_files,
    check_can_write,
)
from adapterhub.hubserver.schemas import discussions as discussion_schemas
from adapterhub.hubserver.schemas import hub as schemas
from adapterhub.hubserver.storage.discussion import Discussion, Event
from adapterhub.hubserver.storage.store import Repo

router = APIRouter()
_PAGE = 50
_ONE = REPO + "/discussions/{num:number}"


@router.api_route(REPO + "/discussions", methods=READ)
def list_discussions(
    repo: Visible,
    hub: HubHere,
    p: PageNumber = 0,
    type: str = "all",
    status: str = "all",
    author: str | None = None,
) -> discussion_schemas.DiscussionPage:
    found = [
        one
        for one in hub.discussions.all(repo)
        if type in ("all", "pull_request" if one.is_pull else "discussion")
        and (status == "all" or (status == "open") == (one.status in ("open", "draft")))
        and author in (None, one.author)
    ]
    start = p * _PAGE
    page = [_reply(repo, one) for one in found[start : start + _PAGE]]
    return discussion_schemas.DiscussionPage(count=len(found), start=start, discussions=page)


@router.post(REPO + "/discussions")
def open_discussion(
    request: discussion_schemas.NewDiscussion, repo: Contributable, user: User, hub: HubHere
) -> discussion_schemas.DiscussionReply:
    opened = hub.discussions.open(
        repo.repo_id,
        author=user.user,
        title=request.title,
        description=request.description,
        is_pull=request.pull_request,
    )
    return _reply(repo, opened)


# Clients read `changes` of pull requests only, and take a `diff` of null for none.
@router.api_route(_ONE, methods=READ)
def show_discussion(repo: Visible, num: int, hub: HubHere, caller: Caller) -> discussion_schemas.DiscussionDetails:
    one = hub.discussions.get(repo, num)
    details = discussion_schemas.DiscussionDetails(
        **_reply(repo, one).model_dump(), events=[_event_reply(event) for event in _events(hub, repo, one)]
    )
    if one.base is None:
        return details
    # Its base may have been deleted since.
    can_merge = one.status in ("open", "draft") and one.base in repo.branches
    return details.model_copy(
        update={
            "changes": discussion_schemas.PullChanges(base=f"refs/heads/{one.base}", merge_commit_id=one.merge_commit),
            "files_with_conflicts": hub.discussions.conflicts(repo, one) if can_merge else [],
            "diff": hub.discussions.diff(repo, one) if can_read_files(caller, repo) else None,
        }
    )


@router.post(_ONE + "/comment")
def comment(
    request: discussion_schemas.NewComment, repo: Contributable, num: int, user: User, hub: HubHere
) -> discussion_schemas.NewMessageReply:
    event = hub.discussions.comment(repo.repo_id, num, text=request.comment, author=user.user)
    return discussion_schemas.NewMessageReply(new_message=_event_reply(event))


@router.post(_ONE + "/comment/{event_id}/edit")
def edit_comment(
    request: discussion_schemas.EditedComment, repo: Contributable, num: int, event_id: str, user: User, hub: HubHere
) -> discussion_schemas.UpdatedCommentReply:
    event = hub.discussions.edit_comment(repo.repo_id, num, event_id=event_id, text=request.content, author=user.user)
    return discussion_schemas.UpdatedCommentReply(updated_comment=_event_reply(event))


@router.post(_ONE + "/comment/{event_id}/hide")
def hide_comment(
    repo: Contributable, num: int, event_id: str, user: User, hub: HubHere
) -> discussion_schemas.UpdatedCommentReply:
    event = hub.discussions.edit_comment(repo.repo_id, num, event_id=event_id, text=None, author=user.user)
    return discussion_schemas.UpdatedCommentReply(updated_comment=_event_reply(event))


@router.post(_ONE + "/title")
def rename(
    request: discussion_schemas.NewTitle, repo: Contributable, num: int, user: User, hub: HubHere
) -> discussion_schemas.NewTitleReply:
    _check_is_ones_own(hub, repo, num, user)
    event = hub.discussions.rename(repo.repo_id, num, title=request.title, author=user.user)
    return discussion_schemas.NewTitleReply(new_title=_event_reply(event))


@router.post(_ONE + "/status")
def set_status(
    request: discussion_schemas.NewStatus, repo: Contributable, num: int, user: User, hub: HubHere
) -> discussion_schemas.NewStatusReply:
    _check_is_ones_own(hub, repo, num, user)
    if request.comment:
        hub.discussions.comment(repo.repo_id, num, text=request.comment, author=user.user)
    event = hub.discussions.set_status(repo.repo_id, num, status=request.status, author=user.user)
    return discussion_schemas.NewStatusReply(new_status=_event_reply(event))


@router.post(_ONE + "/merge")
def merge(
    repo: Writable, num: int, user: User, hub: HubHere, request: discussion_schemas.MergeRequest | None = None
) -> None:
    hub.discussions.merge(repo.repo_id, num, author=user.user)
    if request is not None and request.comment:
        hub.discussions.comment(repo.repo_id, num, text=request.comment, author=user.user)


def _check_is_ones_own(hub: Hub, repo: Repo, num: int, user: Account) -> None:
    if hub.discussions.get(repo, num).author != user.user:
        check_can_write(user, repo.repo_id.namespace)


def _reply(repo: Repo, one: Discussion) -> discussion_schemas.DiscussionReply:
    return discussion_schemas.DiscussionReply(
        num=one.num,
        title=one.title,
        author=discussion_schemas.Person(name=one.author),
        created_at=schemas.iso_time(one.created_s),
        status=one.status,
        is_pull_request=one.is_pull,
        repo=discussion_schemas.DiscussionRepo(name=repo.repo_id.full_name, type=repo.repo_id.kind),
    )


def _events(hub: Hub, repo: Repo, one: Discussion) -> list[Event]:
    """With the merge, which is not an event on disk but a fact about the repository."""
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


def _event_reply(event: Event) -> discussion_schemas.EventReply:
    data = event.data
    if event.type == "comment":
        latest = {"raw": data["text"], "html": "", "updatedAt": schemas.iso_time(event.time_s)}
        data = {"edited": data["edited"], "hidden": data["hidden"], "latest": latest, "history": []}
    return discussion_schemas.EventReply(
        id=event.id,
        type=event.type,
        created_at=schemas.iso_time(event.time_s),
        author=discussion_schemas.Person(name=event.author),
        data=data,
    )
