"""Schemas of the Hub API for discussions, pull requests and access requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from adapterhub.hubserver.schemas.hub import HubSchema

_Text = Annotated[str, Field(max_length=100_000)]
"""Text of a comment: the same limit for every way to write one."""

# Requests


class NewDiscussion(HubSchema):
    """Request to open a discussion or a pull request."""

    title: str = Field(min_length=1, max_length=200)
    description: _Text = ""
    pull_request: bool = False


class NewComment(HubSchema):
    """Request to add a comment."""

    comment: _Text = Field(min_length=1)


class EditedComment(HubSchema):
    """Request to change a comment."""

    content: _Text = Field(min_length=1)


class NewTitle(HubSchema):
    """Request to change the title."""

    title: str = Field(min_length=1, max_length=200)


class NewStatus(HubSchema):
    """Request to open or close a discussion."""

    status: Literal["open", "closed"]
    comment: _Text | None = None


class MergeRequest(HubSchema):
    """Request to merge a pull request."""

    comment: _Text | None = None


class AccessGrant(HubSchema):
    """Request to grant access to a user."""

    user: str


class AccessDecision(HubSchema):
    """Request to change the status of a user's access request."""

    user: str | None = None
    request_id: str | None = None
    status: Literal["pending", "accepted", "rejected"]


# Responses


class Person(HubSchema):
    """The author of a discussion or event."""

    name: str


class EventReply(HubSchema):
    """An event of a discussion."""

    id: str
    type: str
    created_at: str
    author: Person
    data: dict[str, Any]


class NewMessageReply(HubSchema):
    """Response to a new comment."""

    new_message: EventReply


class NewTitleReply(HubSchema):
    """Response to a new title."""

    new_title: EventReply


class NewStatusReply(HubSchema):
    """Response to a new status."""

    new_status: EventReply


class UpdatedCommentReply(HubSchema):
    """Response to a changed comment."""

    updated_comment: EventReply


class DiscussionRepo(HubSchema):
    """The repository of a discussion."""

    name: str
    type: str


class DiscussionReply(HubSchema):
    """A discussion without its events."""

    num: int
    title: str
    author: Person
    created_at: str
    status: str
    is_pull_request: bool
    repo: DiscussionRepo


class DiscussionPage(HubSchema):
    """One page of discussions."""

    count: int
    start: int
    discussions: list[DiscussionReply]


class PullChanges(HubSchema):
    """The target branch and merge commit of a pull request."""

    base: str
    merge_commit_id: str | None


class DiscussionDetails(DiscussionReply):
    """A discussion with its events, and of a pull request the changes."""

    events: list[EventReply]
    changes: PullChanges | None = None
    files_with_conflicts: list[str] | None = None
    diff: str | None = None


class AccessPerson(HubSchema):
    """A user who requested access."""

    user: str
    fullname: str


class AccessItem(HubSchema):
    """An access request."""

    user: AccessPerson
    request_id: str
    status: str
    timestamp: str
