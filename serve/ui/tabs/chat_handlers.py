"""What the buttons of the Chat tab do. Conversations live in the browser: each handler gets one and gives it back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from serve.client import Answer, Sampling, Scaled, to_send
from serve.ui.client import PageClient
from serve.ui.feedback import CORRECT, Feedback
from serve.ui.render.conversation import (
    Line,
    answered,
    answering,
    corrected,
    failed,
    given_at,
    read_lines,
    settled,
    stopped,
    text_of,
    turns_of,
)
from serve.ui.sign_in import key_of
from serve.ui.streams import Ending, Run, Runs

Given = dict[Any, Any]
"""the values of the widgets"""
Updates = dict[Any, Any]


@dataclass(frozen=True)
class Widgets:
    about: Any
    picker: Any
    card: Any
    partner: Any
    scale: Any
    partner_scale: Any
    kept: Any
    fresh: Any
    forget: Any
    as_json: Any
    as_markdown: Any
    system: Any
    temperature: Any
    top_p: Any
    max_tokens: Any
    seed: Any
    chat: Any
    correcting: Any
    wording: Any
    save_wording: Any
    drop_wording: Any
    said: Any
    box: Any
    send: Any
    stop: Any
    corrected_at: Any
    """where in the conversation the answer is that is being corrected"""

    @property
    def asked(self) -> set[Any]:
        """What an answer depends on. As a set, it reaches the handler in one dictionary."""
        mix = {self.picker, self.partner, self.scale, self.partner_scale}
        return {self.chat, self.box, self.system, self.temperature, self.top_p, self.max_tokens, self.seed} | mix

    @property
    def drawn(self) -> list[Any]:
        return [self.chat, self.box, self.send, self.stop]


class Talk:
    """The handlers.

    An answer is drawn by the handler that asked for it and by no other, so that no late drawing undoes a stop.
    """

    def __init__(self, client: PageClient, on: Widgets) -> None:
        self._client = client
        self._on = on
        self._runs = Runs()
        self._feedback = Feedback(client)
        self._nothing: Updates = {on.chat: gr.skip()}
        """an empty dictionary is an error to Gradio, and then nothing that was to follow does"""

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
        self._runs.end(request.session_hash, Ending.LEFT, [])
        return self._nothing  # the browser has cleared it already

    def leave(self, _: str | None, chat: Any, request: gr.Request) -> Updates:
        """The visitor turns to the conversation `chat`, out of the browser's own or empty."""
        lines = read_lines(chat)
        self._runs.end(request.session_hash, Ending.LEFT, lines)
        return self._draw(lines)

    def stop(self, given: Given, request: gr.Request) -> Updates:
        if self._runs.end(request.session_hash, Ending.STOPPED):
            return self._nothing  # the run draws its own end
        return self._draw(settled(read_lines(given[self._on.chat])))  # the server was restarted meanwhile

    async def liked(self, given: Given, request: gr.Request, event: gr.LikeData) -> Updates:
        """A thumb, or the flag that opens the box for a better wording."""
        on, index = self._on, _index(event)
        found = given_at(read_lines(given[on.chat]), index)
        # The same button once more says "": the flag then opens again, a thumb stays as it was kept.
        is_flag = event.liked == CORRECT or (event.liked == "" and index == given[on.corrected_at])
        if is_flag and found is not None:
            wording = {on.wording: found.answer["text"], on.corrected_at: index}
            return {on.correcting: gr.update(visible=True), on.said: "", **wording}
        if found is None or not isinstance(event.liked, bool):
            return {on.said: "", on.corrected_at: None}
        messages = to_send(given[on.system], found.before)
        said = await self._feedback.thumb(messages, found.answer, is_up=event.liked, key=key_of(request))
        return {on.said: said, on.corrected_at: None}

    async def save_wording(self, given: Given, request: gr.Request) -> Updates:
        """Keep the correction, and go on from it."""
        on, index = self._on, given[self._on.corrected_at]
        lines = read_lines(given[on.chat])
        found = None if index is None else given_at(lines, index)
        if found is None:
            return {on.said: "", **self._closed()}
        text = given[on.wording] or ""
        messages = to_send(given[on.system], found.before)
        said = await self._feedback.correction(messages, found.answer, text, key=key_of(request))
        if said.startswith("⚠"):
            return {on.said: said}
        return {
            on.said: said,
            **self._closed(),
            on.chat: _messages(corrected(lines, index, text)),
        }

    def drop_wording(self, given: Given) -> Updates:
        return self._closed()

    def _closed(self) -> Updates:
        """The box without its text: else it opens again with that, and what is typed at once is overwritten."""
        return {self._on.correcting: gr.update(visible=False), self._on.wording: ""}

    async def _answer(self, lines: list[Line], given: Given, request: gr.Request) -> AsyncGenerator[Updates, None]:
        """Ask, draw the answer as it grows, then how it ended. No failure leaves: Gradio would lock the page."""
        on = self._on
        mix = _mix(given[on.picker], given[on.scale], given[on.partner], given[on.partner_scale])
        answer = Answer(given[on.picker] or "", mix)
        messages = to_send(given[on.system], turns_of(lines))
        seed = given[on.seed]
        sampling = Sampling(
            given[on.temperature], int(given[on.max_tokens]), given[on.top_p], None if seed is None else int(seed)
        )
        filled = [(answer, self._client.fill(answer, messages, sampling, key=key_of(request)))]
        async with aclosing(self._runs.follow(request.session_hash, filled)) as states:
            is_first = True
            async for run in states:
                if run.is_done:
                    yield self._draw(_ended(lines, run))
                else:
                    drawn = {on.chat: _messages([*lines, *answering(answer)])}
                    yield drawn | (self._buttons(is_running=True) if is_first else {})
                is_first = False

    def _draw(self, lines: list[Line]) -> Updates:
        return {self._on.chat: _messages(lines), **self._buttons(is_running=False)}

    def _buttons(self, *, is_running: bool) -> Updates:
        return {self._on.send: gr.update(visible=not is_running), self._on.stop: gr.update(visible=is_running)}


def _index(event: gr.LikeData) -> int:
    return event.index if isinstance(event.index, int) else event.index[0]


def _mix(name: str | None, scale: float, partner: str | None, partner_scale: float) -> tuple[Scaled, ...]:
    """Two adapters that answer together; nothing where one answers alone at its own strength."""
    if name and partner and partner != name:
        return (Scaled(name, scale), Scaled(partner, partner_scale))
    return ()


def _ended(lines: list[Line], run: Run) -> list[Line]:
    (answer,) = run.answers
    if run.ending is Ending.LEFT:
        return list(run.left_for)
    if run.ending is Ending.STOPPED:
        return [*lines, *stopped(answer)]
    error = run.error(0)
    return [*lines, *(failed(answer, error) if error else answered(answer))]


def _messages(lines: list[Line]) -> list[dict[str, Any]]:
    return [line.message() for line in lines]
