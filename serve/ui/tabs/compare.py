"""The Compare tab: one prompt to two to four adapters, a diff of their answers, and a report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Any

import gradio as gr

from serve.client import Answer, Sampling, Turn, to_send
from serve.ui.answer_panels import Panels, Updates
from serve.ui.client import PageClient
from serve.ui.model_picker import QUIET, Models, model_picker, trouble
from serve.ui.render.answer_diff import Comparison, report_html, report_markdown, token_diff_html, token_diffs
from serve.ui.render.conversation import escape
from serve.ui.script import save_file
from serve.ui.sign_in import key_of
from serve.ui.streams import AnswerStream, AnswerStreams, StreamEnd
from serve.ui.tabs.chat import CONCURRENT_ANSWERS

MOST = 4
"""Adapters compared at once, at most."""


class CompareTab:
    """The tab's widgets and handlers, drawn inside the current `gr.Tab`. Other tabs may set `picker`."""

    def __init__(self, client: PageClient, tab: Any) -> None:
        self._client = client
        self._streams = AnswerStreams()
        self._draw(client)
        models = Models(client)
        tab.select(models.several, [self.picker], [self.picker], **QUIET)
        self.picker.focus(models.refreshed, None, [self.picker], **QUIET)
        self._connect()

    def _draw(self, client: PageClient) -> None:
        with gr.Row(elem_classes="asking"):
            self.picker = model_picker(
                elem_id="compared",
                label="Adapters, two to four; each is compared with the first",
                multiselect=True,
                max_choices=MOST,
                scale=3,
                min_width=280,
            )
            with gr.Accordion("Settings", open=False, elem_classes="asking-settings"):
                self._system = gr.Textbox(label="System prompt", lines=2, max_lines=8)
                self._temperature = gr.Slider(0.0, 2.0, value=0.0, step=0.05, label="Temperature")
                self._max_tokens = gr.Slider(1, 2048, value=128, step=1, label="Max tokens")
        with gr.Row(elem_classes="composer wide"):
            self._prompt = gr.Textbox(
                elem_id="compare-prompt",
                label="Prompt",
                show_label=False,
                container=False,
                placeholder="One prompt for all of them",
                max_lines=8,
            )
            self._ask = gr.Button("Compare", variant="primary", scale=0, min_width=110)
            self._stop = gr.Button(
                "Stop",
                variant="stop",
                elem_classes="stop",
                scale=0,
                min_width=110,
                visible=False,
                elem_id="compare-stop",
            )
        self._trouble = gr.Markdown(elem_classes="said")
        self._panels = Panels(client, MOST, prefix="compare")
        self._comparison = gr.State(None)
        with gr.Row(visible=False, elem_classes="small-buttons reports") as self._reports:
            self._as_markdown = gr.Button("Save report as Markdown", size="sm", min_width=120)
            self._as_html = gr.Button("Save report as HTML", size="sm", min_width=120)
        self._file = gr.Textbox(visible=False)

    def _connect(self) -> None:
        asked = {self.picker, self._prompt, self._system, self._temperature, self._max_tokens}
        drawn = [*self._panels.outputs, self._ask, self._stop, self._trouble, self._reports, self._comparison]
        gr.on(
            [self._prompt.submit, self._ask.click],
            self._compare,
            asked,
            drawn,
            show_progress="hidden",
            api_visibility="private",
            concurrency_limit=CONCURRENT_ANSWERS,
            trigger_mode="multiple",
        )
        self._stop.click(self._stopped, None, None, **QUIET)
        for button, make, name, kind in (
            (self._as_markdown, report_markdown, "comparison.md", "text/markdown"),
            (self._as_html, report_html, "comparison.html", "text/html"),
        ):
            button.click(make, [self._comparison], [self._file], **QUIET).then(
                None, [self._file], None, js=save_file(name, kind), api_visibility="private"
            )

    def _stopped(self, request: gr.Request) -> None:
        self._streams.cancel(request.session_hash, StreamEnd.STOPPED)

    async def _compare(self, values: dict[Any, Any], request: gr.Request) -> AsyncGenerator[Updates, None]:
        names, prompt = values[self.picker] or [], values[self._prompt] or ""
        if not prompt.strip() or len(names) < 2:
            yield {self._trouble: trouble("write a prompt, and pick at least two to compare.")}
            return
        answers = tuple(Answer(name) for name in names)
        messages = to_send(values[self._system], [Turn("user", prompt)])
        sampling = Sampling(values[self._temperature], int(values[self._max_tokens]))
        key = key_of(request)
        filled = [
            (answer, self._client.fill(answer, messages, sampling, key=key, wants_tokens=True)) for answer in answers
        ]
        async with aclosing(self._streams.follow(request.session_hash, filled)) as states:
            await anext(states)
            yield self._panels.draw_empty(list(names)) | self._buttons(is_streaming=True) | {self._trouble: ""}
            async for stream in states:
                if not stream.is_done:
                    yield self._panels.draw_growing(stream)
                    continue
                made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
                comparison = Comparison(messages, sampling, stream.answers, made)
                yield self._panels.draw_final(stream, messages) | await self._draw_diffs(stream, comparison)

    async def _draw_diffs(self, stream: AnswerStream, comparison: Comparison) -> Updates:
        diffs = await asyncio.to_thread(token_diffs, stream.answers)
        drawn: Updates = self._buttons(is_streaming=False)
        for panel, answer, tokens in zip(self._panels.panels, stream.answers, diffs, strict=False):
            drawn[panel.head] = f"## {escape(answer.name)}\n\n{escape(answer.figures())}"
            drawn[panel.more] = token_diff_html(tokens)
        return drawn | {self._reports: gr.update(visible=True), self._comparison: comparison}

    def _buttons(self, *, is_streaming: bool) -> Updates:
        return {self._ask: gr.update(visible=not is_streaming), self._stop: gr.update(visible=is_streaming)}
