"""Conversations and plain texts, the examples of a data set, with the checks on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
MAX_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the assistant last; `where` is `file:line`."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Text:
    """A text without turns; no chat template renders it."""

    content: str
    where: str


Example = Conversation | Text


@dataclass(frozen=True)
class Source:
    """Examples of a data set, its display name, and notes about what was left out."""

    name: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()


def messages_of(raw: Sequence[Any], *, roles: Mapping[str, Role] | None = None) -> tuple[Message, ...]:
    """Parse `{"role", "content"}` objects; `roles` maps their role names when given.

    Raises ValueError that names the message that is wrong.
    """
    known = roles or {role: role for role in get_args(Role)}
    messages = tuple(_message(number, item, known) for number, item in enumerate(raw, start=1))
    _check_order([message.role for message in messages])
    return messages


def check_encodes(text: str) -> None:
    """Check that the text has no lone surrogate, which JSON can write and no tokenizer reads. Raises ValueError."""
    text.encode()


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Format a count as `1 row` or `3 rows`."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def listed(faults: Sequence[str]) -> str:
    """Format faults as `3 faults: a; b; c`: at most ten, then the count of the rest."""
    rest = len(faults) - MAX_FAULTS_SHOWN
    return (
        f"{counted(len(faults), 'fault')}: "
        + "; ".join(faults[:MAX_FAULTS_SHOWN])
        + (f"; and {rest} more" if rest > 0 else "")
    )


def _message(number: int, raw: Any, roles: Mapping[str, Role]) -> Message:
    if not isinstance(raw, dict):
        raise ValueError(f"message {number} is not an object")
    role = raw.get("role")
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"message {number} has role {role!r}, expected {_either(list(roles))}")
    content = raw.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {number} ({role}) has no text")
    check_encodes(content)
    return Message(roles[role], content)


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _check_order(roles: list[Role]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for place, (found, expected) in enumerate(zip(turns, _turns(), strict=False), start=1 + len(roles) - len(turns)):
        if found != expected:
            raise ValueError(f"message {place} has role {found}, expected {expected}")
    if not turns or turns[-1] != "assistant":
        raise ValueError("the last message is not the assistant's")


def _turns() -> Iterator[Role]:
    while True:
        yield "user"
        yield "assistant"
