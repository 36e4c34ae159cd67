"""What a data set is made of: conversations and plain texts, and how faults in them are told. Reads no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
MAX_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the assistant last; `where` is file:line."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Text:
    """A text without turns, learnt as it is; no chat template renders it."""

    content: str
    where: str


Example = Conversation | Text


@dataclass(frozen=True)
class Source:
    """What was read: a name for people, the examples, and what was left out (in words)."""

    name: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()


def messages_of(raw: Sequence[Any], *, roles: Mapping[str, Role] | None = None) -> tuple[Message, ...]:
    """Messages from `{"role", "content"}` objects, their roles translated by `roles` when given.

    Raises ValueError saying which message is wrong.
    """
    known = roles or {role: role for role in get_args(Role)}
    messages = tuple(_message(number, item, known) for number, item in enumerate(raw, start=1))
    _check_order([message.role for message in messages])
    return messages


def check_encodes(text: str) -> None:
    """Raises ValueError for half of a surrogate pair, which JSON can write and no tokenizer reads."""
    text.encode()


def listed(faults: Sequence[str]) -> str:
    """`3 faults: a; b; c`, ten at most, the rest counted."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    rest = len(faults) - MAX_FAULTS_SHOWN
    return f"{count}: " + "; ".join(faults[:MAX_FAULTS_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _message(number: int, raw: Any, roles: Mapping[str, Role]) -> Message:
    said = raw.get("role") if isinstance(raw, dict) else None
    if not isinstance(said, str) or said not in roles:
        found = repr(said) if isinstance(raw, dict) else "no object"
        raise ValueError(f"message {number} has role {found}, expected {_either(list(roles))}")
    content = raw.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {number} ({said}) has no text")
    check_encodes(content)
    return Message(roles[said], content)


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _check_order(roles: list[Role]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for place, (found, expected) in enumerate(zip(turns, _turns(), strict=False), start=1 + len(roles) - len(turns)):
        if found != expected:
            raise ValueError(f"message {place} is of the {found}, expected the {expected}")
    if not turns or turns[-1] != "assistant":
        raise ValueError("no answer of the assistant at the end")


def _turns() -> Iterator[Role]:
    while True:
        yield "user"
        yield "assistant"
