"""Discussions, pull requests and their events as immutable values."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from adapterhub.hubserver.storage.commit import RepoCommit
from adapterhub.strict import Strict

Status = Literal["draft", "open", "closed", "merged"]


class Event(Strict):
    """An event of a discussion, with the field names of the Hub API."""

    id: str
    type: Literal["comment", "status-change", "title-change", "commit"]
    author: str
    time_s: int
    """Time of the event, in seconds since 1970."""
    data: dict[str, Any]
    """The fields of an event of this type."""

    @classmethod
    def create(
        cls, type: Literal["comment", "status-change", "title-change", "commit"], author: str, data: Any
    ) -> Event:
        """Return an event with a new id and the current time."""
        return cls(id=secrets.token_hex(12), type=type, author=author, time_s=int(time.time()), data=data)

    @classmethod
    def comment(cls, text: str, *, author: str) -> Event:
        """Return a new comment."""
        return cls.create("comment", author, {"edited": False, "hidden": False, "text": text})

    @classmethod
    def commit(cls, commit: RepoCommit) -> Event:
        """Return the event that a commit was added to a pull request."""
        return cls.create("commit", commit.author, {"subject": commit.title, "oid": commit.sha})

    def edited(self, text: str) -> Event:
        """Return the comment with another text."""
        return self.model_copy(update={"data": {**self.data, "edited": True, "text": text}})

    def hidden(self) -> Event:
        """Return the comment without its text."""
        return self.model_copy(update={"data": {**self.data, "hidden": True, "text": ""}})


class Discussion(Strict):
    """A discussion, or a pull request if it has a base."""

    num: int
    title: str
    author: str
    created_s: int
    """Creation time, in seconds since 1970."""
    status: Status
    base: str | None
    """Target branch of a pull request."""
    start: str | None
    """Commit of the target branch when the pull request was opened."""
    head: str | None
    """Most recent commit of the pull request."""
    merge_commit: str | None = None
    events: tuple[Event, ...]

    @property
    def is_pull(self) -> bool:
        """Return whether this is a pull request."""
        return self.base is not None

    def as_merged(self, sha: str) -> Discussion:
        """Return a copy with the status merged."""
        return self.model_copy(update={"status": "merged", "merge_commit": sha})

    def with_event(self, event: Event, **changes: str) -> Discussion:
        """Return a copy with one more event and changed fields."""
        return self.model_copy(update={"events": (*self.events, event), **changes})
