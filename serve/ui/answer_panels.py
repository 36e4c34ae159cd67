"""Answer panels side by side, each with thumbs and a box for a correction, for the Compare and Arena tabs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from serve.client import Answer
from serve.ui.client import Messages, PageClient
from serve.ui.feedback import FeedbackSender
from serve.ui.model_picker import QUIET
from serve.ui.render.conversation import escape
from serve.ui.sign_in import key_of
from serve.ui.streams import AnswerStream, StreamEnd
from serve.ui.style import LATEX

Updates = dict[Any, Any]
"""Widget -> its update."""


@dataclass(frozen=True)
class ShownAnswers:
    """The answers in the panels, kept by the page's server for the visitor: feedback is about exactly these."""

    messages: Messages
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Panel:
    """The widgets of one answer."""

    column: Any
    head: Any
    text: Any
    more: Any
    actions: Any
    up: Any
    down: Any
    correct: Any


_CLOSED = gr.update(visible=False), ""
"""Updates that hide the box for a correction and empty it: else its old text shows for a moment when it opens again."""


class Panels:
    """A row of `count` panels, drawn inside the current layout when it is created."""

    def __init__(self, client: PageClient, count: int, *, prefix: str) -> None:
        self._feedback = FeedbackSender(client)
        self.shown = gr.State(None)
        with gr.Row(elem_classes="panels"):
            self.panels = [_draw_panel(f"{prefix}-{index}") for index in range(count)]
        with gr.Group(visible=False, elem_classes="correcting") as self._correcting:
            self._wording = gr.Textbox(label="What it should have said", lines=3, max_lines=12)
            with gr.Row(elem_classes="small-buttons"):
                save = gr.Button("Save correction", variant="primary", size="sm", min_width=90)
                drop = gr.Button("Cancel", size="sm", min_width=90)
        self._message = gr.Markdown(elem_id=f"{prefix}-said", elem_classes="said")
        self._correcting_at = gr.State(None)
        for index, panel in enumerate(self.panels):
            panel.up.click(self._thumb(index, is_up=True), [self.shown], [self._message], **QUIET)
            panel.down.click(self._thumb(index, is_up=False), [self.shown], [self._message], **QUIET)
            opened = [self._correcting, self._wording, self._correcting_at, self._message]
            panel.correct.click(self._open(index), [self.shown], opened, **QUIET)
        inputs = [self.shown, self._correcting_at, self._wording]
        save.click(self._save, inputs, [self._message, self._correcting, self._wording], **QUIET)
        drop.click(lambda: _CLOSED, None, [self._correcting, self._wording], **QUIET)

    @property
    def outputs(self) -> list[Any]:
        """Widgets that the updates of this class are for."""
        drawn = [
            part for panel in self.panels for part in (panel.column, panel.head, panel.text, panel.more, panel.actions)
        ]
        return [*drawn, self.shown, self._message, self._correcting, self._wording]

    def draw_empty(self, heads: list[str]) -> Updates:
        """Return updates that show an empty panel for each head and hide the others."""
        drawn: Updates = {self.shown: None, self._message: ""}
        drawn |= zip((self._correcting, self._wording), _CLOSED, strict=True)
        for index, panel in enumerate(self.panels):
            is_used = index < len(heads)
            drawn[panel.column] = gr.update(visible=is_used)
            drawn[panel.head] = f"## {escape(heads[index])}" if is_used else ""
            drawn |= {panel.text: "", panel.more: "", panel.actions: gr.update(visible=False)}
        return drawn

    def draw_growing(self, stream: AnswerStream) -> Updates:
        """Return updates with the text so far."""
        return {panel.text: answer.text for panel, answer in zip(self.panels, stream.answers, strict=False)}

    def draw_final(self, stream: AnswerStream, messages: Messages) -> Updates:
        """Return updates with the final answers, or their errors, and with the buttons for feedback."""
        drawn: Updates = {self.shown: ShownAnswers(messages, stream.answers)}
        for index, (panel, answer) in enumerate(zip(self.panels, stream.answers, strict=False)):
            error = None if stream.end else stream.error(index)
            trouble = f"⚠ {escape(error)}" if error else "*stopped*" if stream.end is StreamEnd.STOPPED else ""
            drawn[panel.text] = "\n\n".join(part for part in (answer.text, trouble) if part)
            drawn[panel.actions] = gr.update(visible=bool(answer.text))
        return drawn

    # Handlers are closures: Gradio finds the request parameter by the signature, which functools.partial hides.

    def _thumb(self, index: int, *, is_up: bool) -> Callable[..., Any]:
        async def thumb(shown: ShownAnswers, request: gr.Request) -> str:
            answer = shown.answers[index].wire()
            return await self._feedback.thumb(shown.messages, answer, is_up=is_up, key=key_of(request))

        return thumb

    def _open(self, index: int) -> Callable[..., Any]:
        def opened(shown: ShownAnswers) -> tuple[Any, str, int, str]:
            return gr.update(visible=True), shown.answers[index].text, index, ""

        return opened

    async def _save(self, shown: ShownAnswers, index: int, text: str, request: gr.Request) -> tuple[str, Any, Any]:
        answer = shown.answers[index].wire()
        message = await self._feedback.correction(shown.messages, answer, text or "", key=key_of(request))
        return message, *((gr.update(), gr.update()) if message.startswith("⚠") else _CLOSED)


def _draw_panel(name: str) -> Panel:
    with gr.Column(visible=False, min_width=260, elem_classes="panel", elem_id=name) as column:
        head = gr.Markdown(elem_classes="panel-head")
        text = gr.Markdown(elem_classes="panel-text", latex_delimiters=LATEX)
        more = gr.HTML(elem_classes="panel-more", padding=False)
        with gr.Row(visible=False, elem_classes="small-buttons") as actions:
            up = gr.Button("Good", size="sm", min_width=60)
            down = gr.Button("Bad", size="sm", min_width=60)
            correct = gr.Button("Correct", size="sm", min_width=60)
    return Panel(column, head, text, more, actions, up, down, correct)
