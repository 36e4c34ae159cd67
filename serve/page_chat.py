"""The Chat tab: its widgets, and what each button does. Conversations live in the browser, not here."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from adapterhub.errors import AdapterHubError
from serve.page_client import Answer, PageClient, Sampling, to_send
from serve.page_lines import Line, answered, answering, failed, read_lines, stopped, text_of, turns_of
from serve.page_models import Models, model_picker

REDRAW_S = 0.05
"""a redraw costs more than a token of a small model: draw at most 20 times a second"""
CONCURRENT_ANSWERS = 64
"""what the engine batches and queues; Gradio's own default is 1"""

_HINT = "**Enter** sends, **Shift+Enter** starts a line, **Esc** stops, **Ctrl+K** goes to the adapters."

Messages = list[dict[str, Any]]
Updates = dict[Any, Any]


@dataclass(frozen=True)
class _Widgets:
    about: Any
    picker: Any
    card: Any
    system: Any
    temperature: Any
    top_p: Any
    max_tokens: Any
    chat: Any
    box: Any
    send: Any
    stop: Any

    @property
    def outputs(self) -> list[Any]:
        return [self.chat, self.box, self.send, self.stop]

    @property
    def settings(self) -> list[Any]:
        return [self.picker, self.system, self.temperature, self.top_p, self.max_tokens]


def chat_tab(blocks: Any, client: PageClient, key: Any) -> None:
    """Draw the tab inside the current `gr.Tab` and connect it. `key` is the page's box for the API key."""
    with gr.Row(elem_classes="chat-columns"):
        with gr.Column(scale=1, min_width=280, elem_classes="chat-side"):
            side = _draw_side()
        with gr.Column(scale=4, min_width=300, elem_classes="chat-main"):
            widgets = _Widgets(*side, *_draw_talk())
    _connect_models(blocks, widgets, Models(client), key)
    _connect_talk(widgets, _Talk(client, widgets), key)


def _draw_side() -> list[Any]:
    picker = model_picker(elem_id="picker")
    with gr.Accordion("About", open=False, elem_id="about") as about:
        card = gr.Markdown(elem_id="card")
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        system = gr.Textbox(label="System prompt", lines=2, max_lines=8, elem_id="system")
        temperature = gr.Slider(0.0, 2.0, value=0.7, step=0.05, label="Temperature", elem_id="temperature")
        top_p = gr.Slider(0.05, 1.0, value=0.9, step=0.05, label="Top-p", elem_id="top-p")
        max_tokens = gr.Slider(1, 2048, value=256, step=1, label="Max tokens", elem_id="max-tokens")
        gr.Markdown(_HINT, elem_id="hint")
    return [about, picker, card, system, temperature, top_p, max_tokens]


def _draw_talk() -> list[Any]:
    chat = gr.Chatbot(
        elem_id="chat",
        label="Conversation",
        show_label=False,
        height="100%",
        editable="user",
        buttons=["copy", "copy_all"],  # without this there is a share button that uploads
        layout="bubble",
        placeholder="### Ask something\nSwitch the adapter whenever you like: the next answer is by the one picked.",
    )
    with gr.Row(elem_classes="composer"):
        box = gr.Textbox(
            elem_id="box",
            label="Message",
            show_label=False,
            container=False,
            placeholder="Write a message",
            lines=1,
            max_lines=8,
            scale=1,
        )
        send = gr.Button("Send", variant="primary", elem_id="send", scale=0, min_width=88)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=0, min_width=88, visible=False)
    return [chat, box, send, stop]


def _connect_models(blocks: Any, on: _Widgets, models: Models, key: Any) -> None:
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    blocks.load(models.opened, [key, on.picker], [on.picker, on.card], **quiet)
    blocks.load(None, None, [on.about], js=_OPEN_IF_WIDE, api_visibility="private")
    gr.on([key.submit, key.blur], models.opened, [key, on.picker], [on.picker, on.card], **quiet)
    on.picker.focus(models.refreshed, [key], [on.picker], **quiet)
    on.picker.input(models.card, [key, on.picker], [on.card], **quiet)
    on.picker.input(None, [on.picker], None, js=_KEEP_IN_ADDRESS, api_visibility="private")


_OPEN_IF_WIDE = '() => ({ __type__: "update", open: innerWidth > 700 })'

_KEEP_IN_ADDRESS = """(name) => {
    const address = new URL(location);
    address.searchParams.set("adapter", name);
    history.replaceState(null, "", address);
}"""


def _connect_talk(on: _Widgets, talk: _Talk, key: Any) -> None:
    asking = {
        "outputs": on.outputs,
        "show_progress": "hidden",
        "concurrency_limit": CONCURRENT_ANSWERS,
        "api_visibility": "private",
    }
    asked = gr.on([on.box.submit, on.send.click], talk.send, [on.box, on.chat, key, *on.settings], **asking)
    edited = on.chat.edit(talk.edit, [on.chat, key, *on.settings], cancels=[asked], **asking)
    retried = on.chat.retry(talk.retry, [on.chat, key, *on.settings], cancels=[asked, edited], **asking)
    running = [asked, edited, retried]
    ending = {"outputs": on.outputs, "cancels": running, "show_progress": "hidden", "api_visibility": "private"}
    on.chat.undo(talk.undo, [on.chat], **ending)
    on.chat.clear(talk.clear, **ending)
    on.stop.click(talk.stop, [on.chat], **ending)


class _Talk:
    """The handlers. Each gets the conversation from the browser and gives back what to draw."""

    def __init__(self, client: PageClient, on: _Widgets) -> None:
        self._client = client
        self._on = on

    async def send(self, text: str, shown: Messages, key: str | None, *settings: Any) -> AsyncGenerator[Updates, None]:
        if not text.strip():
            yield {self._on.box: ""}
            return
        lines = [*stopped(read_lines(shown)), Line("user", text)]
        async with aclosing(self._answer(lines, key, *settings)) as updates:
            is_first = True
            async for update in updates:
                yield update | {self._on.box: ""} if is_first else update
                is_first = False

    async def retry(
        self, shown: Messages, key: str | None, picker: Any, system: Any, t: Any, p: Any, n: Any, event: gr.RetryData
    ) -> AsyncGenerator[Updates, None]:
        lines = read_lines(shown)[: event.index + 1]
        async with aclosing(self._answer(lines, key, picker, system, t, p, n)) as updates:
            async for update in updates:
                yield update

    async def edit(
        self, shown: Messages, key: str | None, picker: Any, system: Any, t: Any, p: Any, n: Any, event: gr.EditData
    ) -> AsyncGenerator[Updates, None]:
        lines = [*read_lines(shown)[: event.index], Line("user", text_of(event.value))]
        async with aclosing(self._answer(lines, key, picker, system, t, p, n)) as updates:
            async for update in updates:
                yield update

    def undo(self, shown: Messages, event: gr.UndoData) -> Updates:
        return self._draw(read_lines(shown)[: event.index]) | {self._on.box: text_of(event.value)}

    def clear(self) -> Updates:
        return self._draw([])

    def stop(self, shown: Messages) -> Updates:
        return self._draw(stopped(read_lines(shown)))

    async def _answer(
        self, lines: list[Line], key: str | None, model: str | None, system: str, t: float, p: float, n: float
    ) -> AsyncGenerator[Updates, None]:
        """Ask, draw the answer as it grows, then its figures. No failure leaves: one would lock the page."""
        answer = Answer(model or "")
        yield self._draw([*lines, *answering(answer)], is_running=True)
        try:
            if not model:
                raise AdapterHubError("no adapter is picked: pick one.")
            async with aclosing(
                self._client.ask(key, model, to_send(system, turns_of(lines)), Sampling(t, int(n), p))
            ) as growing:
                drawn_at = 0.0
                async for answer in growing:
                    if time.monotonic() - drawn_at >= REDRAW_S:
                        yield {self._on.chat: _messages([*lines, *answering(answer)])}
                        drawn_at = time.monotonic()
            yield self._draw([*lines, *answered(answer)])
        except AdapterHubError as error:
            yield self._draw([*lines, *failed(answer, str(error))])

    def _draw(self, lines: list[Line], *, is_running: bool = False) -> Updates:
        return {
            self._on.chat: _messages(lines),
            self._on.send: gr.update(visible=not is_running),
            self._on.stop: gr.update(visible=is_running),
        }


def _messages(lines: list[Line]) -> Messages:
    return [line.message() for line in lines]
