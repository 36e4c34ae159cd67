"""The shapes of discussions, pull requests and access requests, as Hub clients send and expect them. Holds no logic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from adapterhub.hubserver.schemas.hub import Shape

# Requests


class NewDiscussion(Shape):
    title: str = Field(min_length=1, max_length=200)
    description: str = Field(default="", max_length=100_000)
    pull_request: bool = False


class NewComment(Shape):
    comment: str = Field(min_length=1, max_length=100_000)


class EditedComment(Shape):
    content: str = Field(min_length=1, max_length=100_000)


class NewTitle(Shape):
    title: str = Field(min_length=1, max_length=200)


class NewStatus(Shape):
    status: Literal["open", "closed"]
    comment: str | None = None


class MergeRequest(Shape):
    comment: str | None = None


class AccessGrant(Shape):
    user: str


class AccessDecision(Shape):
    user: str | None = None
    request_id: str | None = None
    status: Literal["pending", "accepted", "rejected"]


# Replies


class Person(Shape):
    name: str


class EventReply(Shape):
    id: str
    type: str
    created_at: str
    author: Person
    data: dict[str, Any]


class NewMessageReply(Shape):
    new_message: EventReply


class NewTitleReply(Shape):
    new_title: EventReply


class NewStatusReply(Shape):
    new_status: EventReply


class UpdatedCommentReply(Shape):
    updated_comment: EventReply


class DiscussionRepo(Shape):
    name: str
    type: str


class DiscussionReply(Shape):
    num: int
    title: str
    author: Person
    created_at: str
    status: str
    is_pull_request: bool
    repo: DiscussionRepo


class DiscussionPage(Shape):
    count: int
    start: int
    discussions: list[DiscussionReply]


class PullChanges(Shape):
    base: str
    merge_commit_id: str | None


class DiscussionDetails(DiscussionReply):
    events: list[EventReply]
    changes: PullChanges | None = None
    files_with_conflicts: list[str] | None = None
    diff: str | None = None


class AccessPerson(Shape):
    user: str
    fullname: str


class AccessItem(Shape):
    user: AccessPerson
    request_id: str
    status: str
    timestamp: str
