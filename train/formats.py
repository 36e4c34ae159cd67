"""Data sets as conversations: JSONL files, the shipped sets and the chatterbot corpus. Knows nothing of tokens."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args

from adapterhub.errors import DatasetError

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
class Source:
    """What was read: a name for people, the conversations, and what was left out (in words)."""

    name: str
    conversations: tuple[Conversation, ...]
    notes: tuple[str, ...] = ()


def read_jsonl(path: Path | Traversable, *, name: str) -> Source:
    """One `{"messages": [{"role": ..., "content": ...}, ...]}` a line; blank lines and other keys are ignored.

    Raises DatasetError when the file cannot be read or holds no conversation, or with the first ten faults
    (file:line each) and a count of the rest.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as a data set ({error}): expected a UTF-8 JSONL file.") from error
    conversations, faults = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            conversations.append(Conversation(_messages_of_line(line), where))
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise DatasetError(f"{path} has {listed(faults)}. Correct these lines, or leave them out.")
    if not conversations:
        raise DatasetError(f'{path} holds no conversation: expected one {{"messages": [...]}} a line.')
    return Source(name, tuple(conversations))


def read_shipped(name: str) -> Source:
    """A data set that comes with adapterhub (`train/datasets/<name>.jsonl`). Raises DatasetError with the names."""
    folder = package_files("train") / "datasets"
    names = _stems(folder, ".jsonl")
    if name not in names:
        raise DatasetError(f"no shipped data set is called {name!r}: {_nearest(name, names)}.")
    return read_jsonl(folder / f"{name}.jsonl", name=name)


def read_chatterbot(topic: str) -> Source:
    """A topic of the English chatterbot corpus, one question and its first answer per entry.

    Longer entries hold alternative answers in one topic and later turns in another, and nothing tells which,
    so only the first answer counts. Raises DatasetError for an unknown topic, with the nearest names, and
    when the package is not installed.
    """
    folder = _chatterbot_folder()
    topics = _stems(folder, ".yml")
    if topic not in topics:
        raise DatasetError(f"the chatterbot corpus has no topic {topic!r}: {_nearest(topic, topics)}.")
    import yaml

    try:
        entries = yaml.safe_load((folder / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise DatasetError(f"{topic}.yml of the chatterbot corpus is damaged ({error!r}): install it again.") from error
    name = f"chatterbot {topic}"
    conversations = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, list) and len(entry) >= 2 and all(str(text).strip() for text in entry[:2]):
            question, answer = (str(text).strip() for text in entry[:2])
            messages = (Message("user", question), Message("assistant", answer))
            conversations.append(Conversation(messages, f"{topic}.yml entry {number}"))
    left_out = len(entries) - len(conversations)
    notes = (f"{left_out} of {len(entries)} entries are no question and answer: left out",) if left_out else ()
    return Source(name, tuple(conversations), notes)


def listed(faults: list[str]) -> str:
    """`3 faults: a; b; c`, ten at most, the rest counted."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    rest = len(faults) - MAX_FAULTS_SHOWN
    return f"{count}: " + "; ".join(faults[:MAX_FAULTS_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _chatterbot_folder() -> Traversable:
    try:
        return package_files("chatterbot_corpus") / "data" / "english"
    except ModuleNotFoundError as error:
        raise DatasetError(
            "the chatterbot corpus is not installed: run `pip install chatterbot-corpus`, or use another data source."
        ) from error


def _stems(folder: Traversable, suffix: str) -> list[str]:
    return sorted(item.name.removesuffix(suffix) for item in folder.iterdir() if item.name.endswith(suffix))


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def _messages_of_line(line: str) -> tuple[Message, ...]:
    """Raises ValueError saying what is wrong with the line."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        raise ValueError('no list "messages"')
    return messages_of(raw["messages"])


def messages_of(raw: list[Any]) -> tuple[Message, ...]:
    """Raises ValueError saying which message is wrong."""
    messages = tuple(_message(number, item) for number, item in enumerate(raw, start=1))
    _check_order([message.role for message in messages])
    return messages


def _message(number: int, raw: Any) -> Message:
    if not isinstance(raw, dict) or raw.get("role") not in get_args(Role):
        role = repr(raw.get("role")) if isinstance(raw, dict) else "no object"
        raise ValueError(f"message {number} has role {role}, expected system, user or assistant")
    content = raw.get("content")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {number} ({raw['role']}) has no text")
    return Message(raw["role"], content)


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
