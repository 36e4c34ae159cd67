"""A conversation as the page shows it: turns, and notes between them that no model ever reads. Knows no widget."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from serve.chat_client import Answer, Turn

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

    def message(self) -> dict[str, Any]:
        """Gradio's form. The text goes in as a block: as a bare string it would lose its indentation."""
        message: dict[str, Any] = {"role": self.role, "content": [{"type": "text", "text": self.text}]}
        if self.title is not None:
            message["metadata"] = {"title": self.title} | ({"status": self.status} if self.status else {})
        return message


def read_lines(messages: Iterable[dict[str, Any]] | None) -> list[Line]:
    """What the browser sent back, one line for each message; only its text is believed, never a file or a widget."""
    return [_read(message) for message in messages or ()]


def _read(message: dict[str, Any]) -> Line:
    metadata = message.get("metadata") or {}
    role = "user" if message.get("role") == "user" else "assistant"
    return Line(role, text_of(message.get("content")), metadata.get("title"), metadata.get("status"))


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
    return [*_said(answer), Line("assistant", "", escape(answer.model) + _ANSWERING, "pending")]


def answered(answer: Answer) -> list[Line]:
    """A complete answer and its figures, folded away."""
    return [*_said(answer), Line("assistant", _figures(answer), escape(answer.summary()), "done")]


def failed(answer: Answer, message: str) -> list[Line]:
    """What had come before it went wrong, and what went wrong, open to read."""
    return [
        *_said(answer),
        Line("assistant", escape(message), f"⚠ {escape(answer.model) or 'the server'} could not answer"),
    ]


def stopped(answer: Answer) -> list[Line]:
    """What had come when the reader stopped it."""
    return [*_said(answer), _stopped_note(escape(answer.model))]


def settled(lines: list[Line]) -> list[Line]:
    """The same conversation with nobody answering any more, whatever became of the answer that was under way."""
    if not lines or lines[-1].status != "pending":
        return lines
    return [*lines[:-1], _stopped_note((lines[-1].title or "").removesuffix(_ANSWERING))]


def _stopped_note(model: str) -> Line:
    return Line("assistant", "Stopped before its end; what came is kept.", f"{model} · stopped", "done")


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
