"""Answers side by side, each with its thumbs and a box for what it should have said. Compare and Arena draw with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from serve.client import Answer
from serve.ui.client import Messages, PageClient
from serve.ui.feedback import Feedback
from serve.ui.model_picker import QUIET
from serve.ui.render.conversation import escape
from serve.ui.sign_in import key_of
from serve.ui.streams import Ending, Run
from serve.ui.style import LATEX

Updates = dict[Any, Any]


@dataclass(frozen=True)
class Shown:
    """What the panels hold, kept by the page's server for the visitor: feedback is about exactly this."""

    messages: Messages
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Panel:
    """One answer's widgets."""

    column: Any
    head: Any
    text: Any
    more: Any
    actions: Any
    up: Any
    down: Any
    correct: Any


_CLOSED = gr.update(visible=False), ""
"""The box for a correction, and its text: left there, it would be shown for a moment when the box opens again."""


class Panels:
    """`count` answers in a row; drawn where it is made, inside the current layout."""

    def __init__(self, client: PageClient, count: int, *, prefix: str) -> None:
        self._feedback = Feedback(client)
        self.shown = gr.State(None)
        with gr.Row(elem_classes="panels"):
            self.panels = [_draw_panel(f"{prefix}-{index}") for index in range(count)]
        with gr.Group(visible=False, elem_classes="correcting") as self._correcting:
            self._wording = gr.Textbox(label="What it should have said", lines=3, max_lines=12)
            with gr.Row(elem_classes="small-buttons"):
                save = gr.Button("Save correction", variant="primary", size="sm", min_width=90)
                drop = gr.Button("Cancel", size="sm", min_width=90)
        self._said = gr.Markdown(elem_id=f"{prefix}-said", elem_classes="said")
        self._correcting_at = gr.State(None)
        for index, panel in enumerate(self.panels):
            panel.up.click(self._thumb(index, is_up=True), [self.shown], [self._said], **QUIET)
            panel.down.click(self._thumb(index, is_up=False), [self.shown], [self._said], **QUIET)
            opened = [self._correcting, self._wording, self._correcting_at, self._said]
            panel.correct.click(self._open(index), [self.shown], opened, **QUIET)
        given = [self.shown, self._correcting_at, self._wording]
        save.click(self._save, given, [self._said, self._correcting, self._wording], **QUIET)
        drop.click(lambda: _CLOSED, None, [self._correcting, self._wording], **QUIET)

    @property
    def outputs(self) -> list[Any]:
        drawn = [
            part for panel in self.panels for part in (panel.column, panel.head, panel.text, panel.more, panel.actions)
        ]
        return [*drawn, self.shown, self._said, self._correcting, self._wording]

    def begun(self, heads: list[str]) -> Updates:
        """As many empty panels as there are heads, the rest hidden."""
        drawn: Updates = {self.shown: None, self._said: ""}
        drawn |= zip((self._correcting, self._wording), _CLOSED, strict=True)
        for index, panel in enumerate(self.panels):
            is_used = index < len(heads)
            drawn[panel.column] = gr.update(visible=is_used)
            drawn[panel.head] = f"## {escape(heads[index])}" if is_used else ""
            drawn |= {panel.text: "", panel.more: "", panel.actions: gr.update(visible=False)}
        return drawn

    def growing(self, run: Run) -> Updates:
        return {panel.text: answer.text for panel, answer in zip(self.panels, run.answers, strict=False)}

    def ended(self, run: Run, messages: Messages) -> Updates:
        """The answers as they ended, open to feedback; what went wrong is said in its panel."""
        drawn: Updates = {self.shown: Shown(messages, run.answers)}
        for index, (panel, answer) in enumerate(zip(self.panels, run.answers, strict=False)):
            error = None if run.ending else run.error(index)
            trouble = f"⚠ {escape(error)}" if error else "*stopped*" if run.ending is Ending.STOPPED else ""
            drawn[panel.text] = "\n\n".join(part for part in (answer.text, trouble) if part)
            drawn[panel.actions] = gr.update(visible=bool(answer.text))
        return drawn

    # Handlers are made, not partially applied: Gradio finds the request by the signature, and loses it in a partial.

    def _thumb(self, index: int, *, is_up: bool) -> Callable[..., Any]:
        async def thumb(shown: Shown, request: gr.Request) -> str:
            answer = shown.answers[index].wire()
            return await self._feedback.thumb(shown.messages, answer, is_up=is_up, key=key_of(request))

        return thumb

    def _open(self, index: int) -> Callable[..., Any]:
        def opened(shown: Shown) -> tuple[Any, str, int, str]:
            return gr.update(visible=True), shown.answers[index].text, index, ""

        return opened

    async def _save(self, shown: Shown, index: int, text: str, request: gr.Request) -> tuple[str, Any, Any]:
        answer = shown.answers[index].wire()
        said = await self._feedback.correction(shown.messages, answer, text or "", key=key_of(request))
        return said, *((gr.update(), gr.update()) if said.startswith("⚠") else _CLOSED)


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
