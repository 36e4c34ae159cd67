"""The Chat tab: its widgets, and what each button does. Conversations live in the browser, not here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from typing import Any

import gradio as gr

from serve.chat_client import Answer, PageClient, Sampling, to_send
from serve.page_lines import Line, answered, answering, failed, read_lines, settled, stopped, text_of, turns_of
from serve.page_models import Models, model_picker

REDRAW_S = 0.05
"""a redraw costs more than a token of a small model: draw at most 20 times a second"""
CONCURRENT_ANSWERS = 64
"""what the engine batches and queues; Gradio's own default is 1"""

_HINT = "**Enter** sends, **Shift+Enter** starts a line, **Esc** stops, **Ctrl+K** goes to the adapters."

Given = dict[Any, Any]
"""the values of the widgets"""
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


def chat_tab(blocks: Any, client: PageClient, key: Any) -> None:
    """Draw the tab inside the current `gr.Tab` and connect it. `key` is the page's box for the API key."""
    with gr.Row(elem_classes="chat-columns"):
        with gr.Column(scale=1, min_width=280, elem_classes="chat-side"):
            side = _draw_side()
        with gr.Column(scale=4, min_width=300, elem_classes="chat-main"):
            widgets = _Widgets(*side, *_draw_talk())
    _connect_models(blocks, widgets, Models(client), key)
    _connect_talk(widgets, _Talk(client, widgets, key), key)


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
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
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
    quiet = {"outputs": on.outputs, "show_progress": "hidden", "api_visibility": "private"}
    # Gradio loses an event that joins its queue in the moment in which the one before leaves it. So only answers queue,
    # and asking again is always possible.
    at_once = quiet | {"queue": False}
    asking = quiet | {"concurrency_limit": CONCURRENT_ANSWERS, "trigger_mode": "multiple"}
    # As a set, the inputs reach the handler in one dictionary.
    given = {on.chat, on.box, key, on.picker, on.system, on.temperature, on.top_p, on.max_tokens}
    gr.on([on.box.submit, on.send.click], talk.send, given, **asking)
    on.chat.retry(talk.retry, given, **asking)
    on.chat.edit(talk.edit, given, **asking)
    on.chat.undo(talk.undo, {on.chat}, **at_once)
    on.chat.clear(talk.clear, set(), **at_once)
    on.stop.click(talk.stop, {on.chat}, **at_once)


class _Ending(Enum):
    """What becomes of an answer that is ended from outside."""

    STOPPED = "stopped"
    CLEARED = "cleared"
    REPLACED = "replaced"


@dataclass
class _Run:
    """An answer under way in one visitor's page."""

    task: asyncio.Task[None]
    ending: _Ending | None = None

    def end(self, ending: _Ending) -> None:
        self.ending = ending
        self.task.cancel()


class _Talk:
    """The handlers. Each gets the conversation from the browser and gives back what to draw.

    An answer is drawn by the handler that asked for it and by no other, so that no late drawing undoes a stop.
    """

    def __init__(self, client: PageClient, on: _Widgets, key: Any) -> None:
        self._client = client
        self._on = on
        self._key = key
        self._runs: dict[str | None, _Run] = {}
        """by the session of the page"""

    async def send(self, given: Given, request: gr.Request) -> AsyncGenerator[Updates, None]:
        yield {self._on.box: ""}  # in any case: Gradio takes an end without a drawing for a drawing of nothing
        text = given[self._on.box] or ""
        if not text.strip():
            return
        lines = [*settled(read_lines(given[self._on.chat])), Line("user", text)]
        async with aclosing(self._answer(lines, given, request)) as updates:
            async for update in updates:
                yield update

    async def retry(self, given: Given, request: gr.Request, event: gr.RetryData) -> AsyncGenerator[Updates, None]:
        lines = read_lines(given[self._on.chat])[: event.index + 1]
        async with aclosing(self._answer(lines, given, request)) as updates:
            async for update in updates:
                yield update

    async def edit(self, given: Given, request: gr.Request, event: gr.EditData) -> AsyncGenerator[Updates, None]:
        lines = [*read_lines(given[self._on.chat])[: event.index], Line("user", text_of(event.value))]
        async with aclosing(self._answer(lines, given, request)) as updates:
            async for update in updates:
                yield update

    def undo(self, given: Given, event: gr.UndoData) -> Updates:
        return self._draw(read_lines(given[self._on.chat])[: event.index]) | {self._on.box: text_of(event.value)}

    def clear(self, given: Given, request: gr.Request) -> Updates:
        self._end(request, _Ending.CLEARED)
        return {}  # the browser has cleared it already

    def stop(self, given: Given, request: gr.Request) -> Updates:
        if self._end(request, _Ending.STOPPED):
            return {}  # the run draws its own end
        return self._draw(settled(read_lines(given[self._on.chat])))  # the server was restarted meanwhile

    def _end(self, request: gr.Request, ending: _Ending) -> bool:
        run = self._runs.get(request.session_hash)
        if run is not None:
            run.end(ending)
        return run is not None

    async def _answer(self, lines: list[Line], given: Given, request: gr.Request) -> AsyncGenerator[Updates, None]:
        """Ask, draw the answer as it grows, then how it ended. No failure leaves: Gradio would lock the page."""
        on, session = self._on, request.session_hash
        self._end(request, _Ending.REPLACED)
        answer = Answer(given[on.picker] or "")
        messages = to_send(given[on.system], turns_of(lines))
        sampling = Sampling(given[on.temperature], int(given[on.max_tokens]), given[on.top_p])
        run = _Run(asyncio.create_task(self._client.fill(answer, messages, sampling, key=given[self._key])))
        self._runs[session] = run
        try:
            yield self._draw([*lines, *answering(answer)], is_running=True)
            drawn = ""
            while not run.task.done():
                await asyncio.wait({run.task}, timeout=REDRAW_S)
                if answer.text != drawn and not run.task.done():
                    drawn = answer.text
                    yield {on.chat: _messages([*lines, *answering(answer)])}
            if run.ending is not _Ending.REPLACED:
                yield self._draw(_ended(lines, answer, run))
        finally:
            run.task.cancel()
            await asyncio.gather(run.task, return_exceptions=True)
            if self._runs.get(session) is run:
                del self._runs[session]

    def _draw(self, lines: list[Line], *, is_running: bool = False) -> Updates:
        return {
            self._on.chat: _messages(lines),
            self._on.send: gr.update(visible=not is_running),
            self._on.stop: gr.update(visible=is_running),
        }


def _ended(lines: list[Line], answer: Answer, run: _Run) -> list[Line]:
    if run.ending is _Ending.CLEARED:
        return []
    if run.ending is _Ending.STOPPED:
        return [*lines, *stopped(answer)]
    error = run.task.exception()
    return [*lines, *(failed(answer, str(error)) if error else answered(answer))]


def _messages(lines: list[Line]) -> Messages:
    return [line.message() for line in lines]
