"""Entries of the chat: the turns of a conversation, and notes between them that are never sent to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from serve.client import Answer, Turn

Status = Literal["pending", "done"] | None
"""How a note is drawn: with a spinner (pending), folded (done) or open (None)."""

_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#+!|<>~$&:@-]")
"""Characters that Markdown formats with; a colon or an at sign makes an address a link."""

_ANSWERING = " is answering"


@dataclass(frozen=True)
class ChatEntry:
    """A turn, or with a `title` a note, which Gradio draws as a line that unfolds."""

    role: str
    text: str
    title: str | None = None
    status: Status = None
    by: str | None = None
    """Adapter of the answer above a note, as NAME@DIGEST."""

    def message(self) -> dict[str, Any]:
        """Return the entry as Gradio's message. The text is a block: a bare string would lose its indentation."""
        message: dict[str, Any] = {"role": self.role, "content": [{"type": "text", "text": self.text}]}
        if self.title is not None:
            more = {"status": self.status, "id": self.by}
            message["metadata"] = {"title": self.title} | {key: value for key, value in more.items() if value}
        return message


def read_entries(messages: Iterable[dict[str, Any]] | None) -> list[ChatEntry]:
    """Return an entry for each message from the browser: of its content only the text, never a file or a widget."""
    return [_read(message) for message in messages or ()]


def _read(message: dict[str, Any]) -> ChatEntry:
    metadata = message.get("metadata") or {}
    role = "user" if message.get("role") == "user" else "assistant"
    text, by = text_of(message.get("content")), metadata.get("id")
    return ChatEntry(role, text, metadata.get("title"), metadata.get("status"), None if by is None else str(by))


def text_of(content: Any) -> str:
    """Return the text of a message's content, in any of Gradio's forms."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return str(content.get("text") or "")
    return "".join(text_of(block) for block in content or ())


def turns_of(entries: Iterable[ChatEntry]) -> list[Turn]:
    """Return the turns, which are what a model reads, without the notes."""
    return [Turn(entry.role, entry.text) for entry in entries if entry.title is None]


def pending_entries(answer: Answer) -> list[ChatEntry]:
    """Return the text so far of an unfinished answer, and a note of who is answering."""
    return [
        *_text_entries(answer),
        ChatEntry("assistant", "", escape(answer.name) + _ANSWERING, "pending", _by(answer)),
    ]


def final_entries(answer: Answer) -> list[ChatEntry]:
    """Return a complete answer, and a folded note with its figures."""
    note = ChatEntry("assistant", _figures(answer), escape(answer.summary()), "done", _by(answer))
    return [*_text_entries(answer), note]


def failed_entries(answer: Answer, message: str) -> list[ChatEntry]:
    """Return the text before an answer failed, and an open note with the error."""
    return [
        *_text_entries(answer),
        ChatEntry("assistant", escape(message), f"⚠ {escape(answer.name) or 'the server'} could not answer"),
    ]


def stopped_entries(answer: Answer) -> list[ChatEntry]:
    """Return the text before the user stopped an answer, and a note that it was stopped."""
    return [*_text_entries(answer), _stopped_note(escape(answer.name), _by(answer))]


def finalize_pending(entries: list[ChatEntry]) -> list[ChatEntry]:
    """Return the entries with a pending answer at their end marked as stopped."""
    if not entries or entries[-1].status != "pending":
        return entries
    return [*entries[:-1], _stopped_note((entries[-1].title or "").removesuffix(_ANSWERING), entries[-1].by)]


def _stopped_note(name: str, by: str | None) -> ChatEntry:
    return ChatEntry("assistant", "Stopped by you; the text so far is kept.", f"{name} · stopped", "done", by)


@dataclass(frozen=True)
class RatedAnswer:
    """An answer of a conversation that feedback is about."""

    before: list[Turn]
    """Turns before the answer, which its model has read."""
    answer: dict[str, str | None]
    """The answer's `model`, `digest` and `text`."""


def rated_answer_at(entries: list[ChatEntry], index: int) -> RatedAnswer | None:
    """Return the answer at `index`; None for a note, a question, or a text that no model wrote."""
    if index + 1 >= len(entries) or entries[index].title is not None or entries[index].role != "assistant":
        return None
    by = entries[index + 1].by
    if by is None:
        return None
    name, _, digest = by.rpartition("@")
    text = entries[index].text
    return RatedAnswer(turns_of(entries[:index]), {"model": name, "digest": digest or None, "text": text})


def with_correction(entries: list[ChatEntry], index: int, text: str) -> list[ChatEntry]:
    """Return the entries with `text` as the answer at `index`, and a note that a person wrote it."""
    title = (entries[index + 1].title or "").partition(" · ")[0]
    note = ChatEntry("assistant", "The conversation continues from your text.", f"{title} · corrected by you", "done")
    return [*entries[:index], ChatEntry("assistant", text), note, *entries[index + 2 :]]


def _by(answer: Answer) -> str:
    return f"{answer.name}@{answer.digest or ''}"


def _text_entries(answer: Answer) -> list[ChatEntry]:
    return [ChatEntry("assistant", answer.text)] if answer.text else []


def _figures(answer: Answer) -> str:
    ends = {"stop": "complete", "length": "cut at the token limit"}
    parts = [f"{answer.prompt_tokens} tokens read"] if answer.prompt_tokens is not None else []
    parts += [f"{answer.num_tokens} written", ends.get(answer.finish_reason or "", f"ended: {answer.finish_reason}")]
    return ", ".join(parts) + "."


def escape(text: str) -> str:
    """Return plain text escaped for Markdown: names and licenses come from whoever packed the adapter."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found.group())};", " ".join(text.split()))
