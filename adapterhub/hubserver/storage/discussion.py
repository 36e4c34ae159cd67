"""One discussion or pull request as a value, and what happens in it. Knows no disk, no refs and no HTTP."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from adapterhub.hubserver.storage.commits import Commit

Status = Literal["draft", "open", "closed", "merged"]


class Event(BaseModel):
    """Something that happened, in the words of the protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    type: Literal["comment", "status-change", "title-change", "commit"]
    author: str
    time_s: int
    """seconds since 1970"""
    data: dict[str, Any]
    """what clients read of an event of this type"""

    @classmethod
    def made(cls, type: Literal["comment", "status-change", "title-change", "commit"], author: str, data: Any) -> Event:
        """An event of now."""
        return cls(id=secrets.token_hex(12), type=type, author=author, time_s=int(time.time()), data=data)

    @classmethod
    def comment(cls, text: str, *, author: str) -> Event:
        return cls.made("comment", author, {"edited": False, "hidden": False, "text": text})

    @classmethod
    def commit(cls, commit: Commit) -> Event:
        return cls.made("commit", commit.author, {"subject": commit.title, "oid": commit.sha})

    def edited(self, text: str) -> Event:
        return self.model_copy(update={"data": {**self.data, "edited": True, "text": text}})

    def hidden(self) -> Event:
        """The text is dropped for good."""
        return self.model_copy(update={"data": {**self.data, "hidden": True, "text": ""}})


class Discussion(BaseModel):
    """A discussion, or a pull request when it has a base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num: int
    title: str
    author: str
    created_s: int
    """seconds since 1970"""
    status: Status
    base: str | None
    """the branch a pull request is for"""
    start: str | None
    """commit of the base when it was opened"""
    head: str | None
    """its newest commit"""
    merge_commit: str | None = None
    events: tuple[Event, ...]

    @property
    def is_pull(self) -> bool:
        return self.base is not None

    def merged(self, sha: str) -> Discussion:
        return self.model_copy(update={"status": "merged", "merge_commit": sha})

    def with_event(self, event: Event, **changes: str) -> Discussion:
        return self.model_copy(update={"events": (*self.events, event), **changes})
