"""A conversation as the page shows it: turns, and notes between them that no model ever reads. Knows no widget."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from serve.client import Answer, Turn

Status = Literal["pending", "done"] | None
"""How a note is drawn: with a spinner, folded, or open"""

_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#+!|<>~$&:@-]")
"""what formats; a colon or an at sign makes an address a link"""

_ANSWERING = " is answering"


@dataclass(frozen=True)
class Line:
    """A turn, or with a `title` a note: Gradio draws those as a foldable line."""

    role: str
    text: str
    title: str | None = None
    status: Status = None
    by: str | None = None
    """of a note under an answer: who gave it, and the digest that answered, as NAME@DIGEST"""

    def message(self) -> dict[str, Any]:
        """Gradio's form. The text goes in as a block: as a bare string it would lose its indentation."""
        message: dict[str, Any] = {"role": self.role, "content": [{"type": "text", "text": self.text}]}
        if self.title is not None:
            more = {"status": self.status, "id": self.by}
            message["metadata"] = {"title": self.title} | {key: value for key, value in more.items() if value}
        return message


def read_lines(messages: Iterable[dict[str, Any]] | None) -> list[Line]:
    """What the browser sent back, one line for each message; only its text is believed, never a file or a widget."""
    return [_read(message) for message in messages or ()]


def _read(message: dict[str, Any]) -> Line:
    metadata = message.get("metadata") or {}
    role = "user" if message.get("role") == "user" else "assistant"
    text, by = text_of(message.get("content")), metadata.get("id")
    return Line(role, text, metadata.get("title"), metadata.get("status"), None if by is None else str(by))


def text_of(content: Any) -> str:
    """The text of a message's content, whichever of Gradio's forms it has."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return str(content.get("text") or "")
    return "".join(text_of(block) for block in content or ())


def turns_of(lines: Iterable[Line]) -> list[Turn]:
    """What a model may read of it."""
    return [Turn(line.role, line.text) for line in lines if line.title is None]


def answering(answer: Answer) -> list[Line]:
    """An answer under way: what has come, and who is at it."""
    return [*_said(answer), Line("assistant", "", escape(answer.name) + _ANSWERING, "pending", _by(answer))]


def answered(answer: Answer) -> list[Line]:
    """A complete answer and its figures, folded away."""
    return [*_said(answer), Line("assistant", _figures(answer), escape(answer.summary()), "done", _by(answer))]


def failed(answer: Answer, message: str) -> list[Line]:
    """What had come before it went wrong, and what went wrong, open to read."""
    return [
        *_said(answer),
        Line("assistant", escape(message), f"⚠ {escape(answer.name) or 'the server'} could not answer"),
    ]


def stopped(answer: Answer) -> list[Line]:
    """What had come when the reader stopped it."""
    return [*_said(answer), _stopped_note(escape(answer.name), _by(answer))]


def settled(lines: list[Line]) -> list[Line]:
    """The same conversation with nobody answering any more, whatever became of the answer that was under way."""
    if not lines or lines[-1].status != "pending":
        return lines
    return [*lines[:-1], _stopped_note((lines[-1].title or "").removesuffix(_ANSWERING), lines[-1].by)]


def _stopped_note(name: str, by: str | None) -> Line:
    return Line("assistant", "Stopped before its end; what came is kept.", f"{name} · stopped", "done", by)


@dataclass(frozen=True)
class Given:
    """An answer in a conversation, as feedback names it."""

    before: list[Turn]
    """what its model had read"""
    answer: dict[str, str | None]
    """`model`, `digest`, `text`"""


def given_at(lines: list[Line], index: int) -> Given | None:
    """The answer at `index`; None for a note, a question, or a text that no model wrote."""
    if index + 1 >= len(lines) or lines[index].title is not None or lines[index].role != "assistant":
        return None
    by = lines[index + 1].by
    if by is None:
        return None
    name, _, digest = by.rpartition("@")
    text = lines[index].text
    return Given(turns_of(lines[:index]), {"model": name, "digest": digest or None, "text": text})


def corrected(lines: list[Line], index: int, text: str) -> list[Line]:
    """The conversation as if `text` had been answered; the note under it says that a person wrote it."""
    title = (lines[index + 1].title or "").partition(" · ")[0]
    note = Line("assistant", "The conversation goes on from your wording.", f"{title} · corrected by you", "done")
    return [*lines[:index], Line("assistant", text), note, *lines[index + 2 :]]


def _by(answer: Answer) -> str:
    return f"{answer.name}@{answer.digest or ''}"


def _said(answer: Answer) -> list[Line]:
    return [Line("assistant", answer.text)] if answer.text else []


def _figures(answer: Answer) -> str:
    ends = {"stop": "ended by itself", "length": "cut at the limit of tokens"}
    parts = [f"{answer.prompt_tokens} tokens read"] if answer.prompt_tokens is not None else []
    parts += [f"{answer.num_tokens} written", ends.get(answer.finish_reason or "", f"ended: {answer.finish_reason}")]
    return ", ".join(parts) + "."


def escape(text: str) -> str:
    """Plain text for Markdown: names and licences come from whoever packed the adapter."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found.group())};", " ".join(text.split()))
