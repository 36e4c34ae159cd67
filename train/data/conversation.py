"""Conversations and plain texts, the examples of a data set, with the checks on them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
MAX_FAULTS_SHOWN = 10

CHAT_ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
"""Role names of OpenAI's messages."""

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an answer's thoughts, as transformers takes them."""
_MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "weight", "train", *_REASONING_KEYS)

_INERT = frozenset(
    {
        "", "Unnamed: 0", "__index_level_0__", "id", "idx", "index", "uuid", "guid", "hash",
        "source", "sources", "dataset", "origin", "url", "license", "split", "category", "categories", "topic", "tags",
        "lang", "language", "score", "scores", "score_chosen", "score_rejected", "rating", "quality", "difficulty",
        "created", "created_at", "timestamp", "metadata", "meta", "model", "model_name", "generator", "annotator",
        "task", "task_name", "task_type", "task_source", "template_type", "num_turns", "num_tokens", "_template_idx",
        "_task_source", "_task_name", "_template_type",
    }
)  # fmt: skip
"""Keys of published data sets that describe a row or message and are no part of its text."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str
    is_trained: bool = True
    """Whether an answer is trained; False: it is context of later ones only."""
    reasoning: str = ""
    """Thoughts before the answer."""
    tool_calls: str = ""
    """Calls of the answer, as JSON: a list in OpenAI's form, whose arguments are objects."""
    tool_call_id: str = ""
    name: str = ""

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = json.loads(self.tool_calls)
        if self.tool_call_id:
            found["tool_call_id"] = self.tool_call_id
        if self.name:
            found["name"] = self.name
        return found

    @property
    def thoughts(self) -> str:
        """Thoughts of the answer: its reasoning, or what `</think>` ends in its text."""
        if self.reasoning:
            return self.reasoning.strip()
        before, end, _ = self.content.partition("</think>")
        return before.strip().removeprefix("<think>").strip() if end else ""


@dataclass(frozen=True)
class Conversation:
    """Messages with the assistant's last; `where` is `file:line`.

    After an optional system message, user and assistant alternate. Tools answer an assistant that called them.
    """

    messages: tuple[Message, ...]
    where: str
    tools: str = ""
    """Tools that the assistant may call, as JSON: a list in OpenAI's form."""


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
    weight: float = 1.0
    """Passes over the examples in an epoch."""
    parts: tuple[Source, ...] = ()
    """Sources that a mix is made of; its examples are theirs."""


def messages_of(raw: Sequence[Any], *, roles: Mapping[str, Role] | None = None) -> tuple[Message, ...]:
    """Parse messages in OpenAI's form; `roles` maps their role names when given.

    Every key is used, describes the message only (`is_inert`), or is refused. Raises ValueError that names the message
    that is wrong.
    """
    messages = tuple(_message(number, item, roles or CHAT_ROLES) for number, item in enumerate(raw, start=1))
    check_order(messages)
    return messages


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_inert(key: str) -> bool:
    """Return whether the key describes a row or message, and is no part of its text."""
    return key in _INERT or key.endswith("_id")


def check_keys(value: Mapping[str, Any], known: Collection[str], *, what: str) -> None:
    """Check that every key with a value is known or inert. Raises ValueError that names the others."""
    unknown = [key for key in value if key not in known and not is_inert(str(key)) and not is_empty(value[key])]
    if unknown:
        names = json.dumps([str(key) for key in unknown], ensure_ascii=False)
        raise ValueError(
            f"{what} {'unknown key' if len(unknown) == 1 else 'unknown keys'} {', '.join(map(repr, unknown))} "
            f"(ignore = {names} in [data] leaves {'it' if len(unknown) == 1 else 'them'} out)"
        )


def check_encodes(text: str) -> None:
    """Check that the text has no lone surrogate, which JSON can write and no tokenizer reads. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a character, \\u{ord(text[error.start]):04x} at place {error.start} of {text[:20]!r}: write the "
            "whole character"
        ) from error


def tools_of(raw: Any) -> str:
    """Parse the tools of a row, a list or its JSON; return them as JSON in OpenAI's form. Raises ValueError."""
    tools = _json_value(raw, "'tools'")
    if is_empty(tools):
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' is not a list of objects")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(isinstance(tool["function"], dict) and tool["function"].get("name") for tool in wrapped):
        raise ValueError("a tool has no name")
    return _to_json(wrapped)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Format a count as `1 row` or `3 rows`."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def listed(faults: Sequence[str]) -> str:
    """Format faults, each `file:line: what is wrong`, as their number and one line each.

    Equal faults share a line. At most ten lines are shown, and at most ten places in each.
    """
    places: dict[str, list[str]] = {}
    for fault in faults:
        where, _, what = fault.partition(": ")
        places.setdefault(what, []).append(where)
    entries = [f"{_shown(where, ', ', ' and ')}: {what}" for what, where in places.items()]
    head = f"{counted(len(faults), 'fault')}:"
    if len(entries) == 1:
        return f"{head} {entries[0]}"
    return "\n  ".join([head, _shown(entries, "\n  ", "\n  and ")])


def _shown(items: Sequence[str], separator: str, last: str) -> str:
    rest = len(items) - MAX_FAULTS_SHOWN
    return separator.join(items[:MAX_FAULTS_SHOWN]) + (f"{last}{rest} more" if rest > 0 else "")


def with_advice(text: str, advice: str) -> str:
    """Append what to do to a message, on a line of its own after several lines."""
    return f"{text}\n{advice}" if "\n" in text else f"{text}. {advice}"


def _message(number: int, raw: Any, roles: Mapping[str, Role]) -> Message:
    if not isinstance(raw, dict):
        raise ValueError(f"message {number} is not an object")
    role = raw.get("role")
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"message {number} has role {role!r}, expected {_either(list(roles))}")
    check_keys(raw, _MESSAGE_KEYS, what=f"message {number} has the")
    name = f"message {number} ({role})"
    calls = _tool_calls(raw.get("tool_calls"), name)
    content = _content(raw.get("content"), name)
    if not content.strip() and not calls:
        raise ValueError(f"{name} has no text")
    message = Message(
        role=roles[role],
        content=content,
        is_trained=_is_trained(raw, roles[role], name),
        reasoning=_reasoning(raw, name),
        tool_calls=calls,
        tool_call_id=_optional_text(raw, "tool_call_id", name),
        name=_optional_text(raw, "name", name),
    )
    if message.role != "assistant" and (message.reasoning or message.tool_calls):
        raise ValueError(f"{name} has {'thoughts' if message.reasoning else 'tool_calls'}, which only an answer has")
    return message


def _content(raw: Any, name: str) -> str:
    """Return a message's text: a string, or the text of its parts."""
    if isinstance(raw, list):
        for part in raw:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{name} has a part of type {kind!r}: only text is trained")
            check_keys(part, ("type", "text"), what=f"a part of {name} has the")
        raw = "".join(part["text"] for part in raw)
    if is_empty(raw):
        return ""
    if not isinstance(raw, str):
        raise ValueError(f"{name} has no text")
    check_encodes(raw)
    return raw


def _is_trained(raw: Mapping[str, Any], role: Role, name: str) -> bool:
    """Return whether `weight` (0 or 1) and `train` (true or false) let an answer be trained."""
    marks = {key: raw[key] for key in ("weight", "train") if raw.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise ValueError(f"{name} has {key} {mark!r}, expected {'0 or 1' if key == 'weight' else 'true or false'}")
        if mark and role != "assistant":
            raise ValueError(f"{name} has {key} {mark!r}: only answers are trained one by one, so leave it out")
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise ValueError(f"{name} has weight {raw['weight']!r} and train {raw['train']!r}, which contradict each other")
    return all(marks.values())


def _reasoning(raw: Mapping[str, Any], name: str) -> str:
    found = {_optional_text(raw, key, name) for key in _REASONING_KEYS} - {""}
    if len(found) > 1:
        raise ValueError(f"{name} has different thoughts under {', '.join(_REASONING_KEYS)}")
    return found.pop() if found else ""


def _optional_text(raw: Mapping[str, Any], key: str, name: str) -> str:
    value = raw.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} of {name} is not a string")
    check_encodes(value)
    return value


def _tool_calls(raw: Any, name: str) -> str:
    calls = _json_value(raw, f"'tool_calls' of {name}")
    if is_empty(calls):
        return ""
    if not isinstance(calls, list):
        raise ValueError(f"'tool_calls' of {name} is not a list")
    return _to_json([_tool_call(call, name) for call in calls])


def _tool_call(raw: Any, name: str) -> dict[str, Any]:
    """Return a call in OpenAI's form, its arguments parsed: templates write them as JSON."""
    if not isinstance(raw, dict):
        raise ValueError(f"a tool call of {name} is not an object")
    function = raw.get("function", {key: raw[key] for key in ("name", "arguments") if key in raw})
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call of {name} names no function")
    check_keys(
        raw, ("type", "function", "id", *(() if "function" in raw else function)), what=f"a call of {name} has the"
    )
    check_keys(function, ("name", "arguments"), what=f"a call of {name} has the")
    arguments = _json_value(function.get("arguments"), f"the arguments of {function['name']}")
    if not is_empty(arguments) and not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {function['name']} in {name} are not an object")
    named = {"id": raw["id"]} if raw.get("id") else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _json_value(raw: Any, name: str) -> Any:
    """Return the value that a text holds as JSON, or the value itself when it is no text."""
    if not isinstance(raw, str) or not raw.strip():
        return None if isinstance(raw, str) else raw
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from error


def _to_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    check_encodes(text)
    return text


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def check_order(messages: Sequence[Message]) -> None:
    """Check the order that `Conversation` describes. Raises ValueError that names the first message out of it."""
    expected: tuple[Role, ...] = ("system", "user")
    for place, message in enumerate(messages, start=1):
        if message.role not in expected:
            names = " or ".join(role for role in expected if role != "system")
            raise ValueError(f"message {place} has role {message.role}, expected {names}")
        expected = _next_roles(message)
    if not messages or messages[-1].role != "assistant":
        raise ValueError("the last message is not the assistant's")


def _next_roles(message: Message) -> tuple[Role, ...]:
    if message.role == "system":
        return ("user",)
    if message.role == "assistant":
        return ("tool",) if message.tool_calls else ("user",)
    return ("assistant",) if message.role == "user" else ("tool", "assistant")
