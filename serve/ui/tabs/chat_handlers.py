"""Handlers of the Chat tab. Conversations stay in the browser: each handler receives one and returns it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr

from serve.client import Answer, Sampling, Scaled, to_send
from serve.ui.client import PageClient
from serve.ui.feedback import CORRECT, FeedbackSender
from serve.ui.render.conversation import (
    ChatEntry,
    failed_entries,
    final_entries,
    finalize_pending,
    pending_entries,
    rated_answer_at,
    read_entries,
    stopped_entries,
    text_of,
    turns_of,
    with_correction,
)
from serve.ui.sign_in import key_of
from serve.ui.streams import AnswerStream, AnswerStreams, StreamEnd

Values = dict[Any, Any]
"""Widget -> its value."""
Updates = dict[Any, Any]
"""Widget -> its update."""


@dataclass(frozen=True)
class Widgets:
    """The widgets of the Chat tab."""

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
    """Index in the conversation of the answer that is being corrected."""

    @property
    def asked(self) -> set[Any]:
        """Inputs that an answer depends on. Gradio passes a set as one dictionary."""
        mix = {self.picker, self.partner, self.scale, self.partner_scale}
        return {self.chat, self.box, self.system, self.temperature, self.top_p, self.max_tokens, self.seed} | mix

    @property
    def drawn(self) -> list[Any]:
        """Outputs that a handler draws."""
        return [self.chat, self.box, self.send, self.stop]


class ChatHandlers:
    """The handlers of the Chat tab.

    An answer is drawn by the handler that requested it and by no other, so that no late drawing undoes a stop.
    """

    def __init__(self, client: PageClient, on: Widgets) -> None:
        self._client = client
        self._on = on
        self._streams = AnswerStreams()
        self._feedback = FeedbackSender(client)
        self._nothing: Updates = {on.chat: gr.skip()}
        """Updates that change nothing: an empty dictionary is an error in Gradio, and the events after it are lost."""

    async def send(self, values: Values, request: gr.Request) -> AsyncGenerator[Updates, None]:
        """Answer the message in the box."""
        yield {self._on.box: ""}  # always: Gradio reads an end without an update as an update to nothing
        text = values[self._on.box] or ""
        if not text.strip():
            return
        entries = [*finalize_pending(read_entries(values[self._on.chat])), ChatEntry("user", text)]
        async with aclosing(self._answer(entries, values, request)) as updates:
            async for update in updates:
                yield update

    async def retry(self, values: Values, request: gr.Request, event: gr.RetryData) -> AsyncGenerator[Updates, None]:
        """Answer the last message again."""
        entries = read_entries(values[self._on.chat])[: event.index + 1]
        async with aclosing(self._answer(entries, values, request)) as updates:
            async for update in updates:
                yield update

    async def edit(self, values: Values, request: gr.Request, event: gr.EditData) -> AsyncGenerator[Updates, None]:
        """Answer an edited message, and drop what follows it."""
        kept = read_entries(values[self._on.chat])[: event.index]
        entries = [*kept, ChatEntry("user", text_of(event.value))]
        async with aclosing(self._answer(entries, values, request)) as updates:
            async for update in updates:
                yield update

    def undo(self, values: Values, event: gr.UndoData) -> Updates:
        """Remove the last message and its answer, and put the message back into the box."""
        return self._draw(read_entries(values[self._on.chat])[: event.index]) | {self._on.box: text_of(event.value)}

    def clear(self, values: Values, request: gr.Request) -> Updates:
        """Cancel the answer of the conversation that the browser has cleared."""
        self._streams.cancel(request.session_hash, StreamEnd.LEFT, [])
        return self._nothing  # the browser has cleared it already

    def leave(self, _: str | None, chat: Any, request: gr.Request) -> Updates:
        """Show the conversation `chat`, one of the browser's or an empty one."""
        entries = read_entries(chat)
        self._streams.cancel(request.session_hash, StreamEnd.LEFT, entries)
        return self._draw(entries)

    def stop(self, values: Values, request: gr.Request) -> Updates:
        """Stop the answer, and keep its text so far."""
        if self._streams.cancel(request.session_hash, StreamEnd.STOPPED):
            return self._nothing  # the stream draws its own end
        return self._draw(finalize_pending(read_entries(values[self._on.chat])))  # the server was restarted meanwhile

    async def liked(self, values: Values, request: gr.Request, event: gr.LikeData) -> Updates:
        """Send a thumb, or fill the box for a correction when the flag was clicked."""
        on, index = self._on, _index(event)
        found = rated_answer_at(read_entries(values[on.chat]), index)
        # A second click on a button sends "": the flag then opens again, a thumb stays as it was stored.
        is_flag = event.liked == CORRECT or (event.liked == "" and index == values[on.corrected_at])
        if is_flag and found is not None:
            return {on.said: "", on.wording: found.answer["text"], on.corrected_at: index}
        if found is None or not isinstance(event.liked, bool):
            return {on.said: "", on.corrected_at: None}
        messages = to_send(values[on.system], found.before)
        message = await self._feedback.thumb(messages, found.answer, is_up=event.liked, key=key_of(request))
        return {on.said: message, on.corrected_at: None}

    def show_correction(self, values: Values) -> Updates:
        """Open the box for a correction, or close it where no answer is being corrected."""
        return {self._on.correcting: gr.update(visible=values[self._on.corrected_at] is not None)}

    async def save_wording(self, values: Values, request: gr.Request) -> Updates:
        """Send the correction, and continue the conversation from it."""
        on, index = self._on, values[self._on.corrected_at]
        entries = read_entries(values[on.chat])
        found = None if index is None else rated_answer_at(entries, index)
        if found is None:
            return {on.said: "", **self._closed()}
        text = values[on.wording] or ""
        messages = to_send(values[on.system], found.before)
        message = await self._feedback.correction(messages, found.answer, text, key=key_of(request))
        if message.startswith("⚠"):
            return {on.said: message}
        return {
            on.said: message,
            **self._closed(),
            on.chat: _messages(with_correction(entries, index, text)),
        }

    def drop_wording(self, values: Values) -> Updates:
        """Close the box for a correction without sending it."""
        return self._closed()

    def _closed(self) -> Updates:
        """Hide the box and empty it: else it opens with the old text, and what is typed at once is overwritten."""
        return {self._on.correcting: gr.update(visible=False), self._on.wording: ""}

    async def _answer(
        self, entries: list[ChatEntry], values: Values, request: gr.Request
    ) -> AsyncGenerator[Updates, None]:
        """Request an answer, draw it as it grows, then how it ended. Raise nothing: Gradio would lock the page."""
        on = self._on
        mix = _mix(values[on.picker], values[on.scale], values[on.partner], values[on.partner_scale])
        answer = Answer(values[on.picker] or "", mix)
        messages = to_send(values[on.system], turns_of(entries))
        seed = values[on.seed]
        sampling = Sampling(
            values[on.temperature], int(values[on.max_tokens]), values[on.top_p], None if seed is None else int(seed)
        )
        filled = [(answer, self._client.fill(answer, messages, sampling, key=key_of(request)))]
        async with aclosing(self._streams.follow(request.session_hash, filled)) as states:
            is_first = True
            async for stream in states:
                if stream.is_done:
                    yield self._draw(_with_end(entries, stream))
                else:
                    drawn = {on.chat: _messages([*entries, *pending_entries(answer)])}
                    yield drawn | (self._buttons(is_streaming=True) if is_first else {})
                is_first = False

    def _draw(self, entries: list[ChatEntry]) -> Updates:
        return {self._on.chat: _messages(entries), **self._buttons(is_streaming=False)}

    def _buttons(self, *, is_streaming: bool) -> Updates:
        return {self._on.send: gr.update(visible=not is_streaming), self._on.stop: gr.update(visible=is_streaming)}


def _index(event: gr.LikeData) -> int:
    return event.index if isinstance(event.index, int) else event.index[0]


def _mix(name: str | None, scale: float, partner: str | None, partner_scale: float) -> tuple[Scaled, ...]:
    """Return the mix of two adapters; nothing where one answers alone at its own scale."""
    if name and partner and partner != name:
        return (Scaled(name, scale), Scaled(partner, partner_scale))
    return ()


def _with_end(entries: list[ChatEntry], stream: AnswerStream) -> list[ChatEntry]:
    (answer,) = stream.answers
    if stream.end is StreamEnd.LEFT:
        return list(stream.show_instead)
    if stream.end is StreamEnd.STOPPED:
        return [*entries, *stopped_entries(answer)]
    error = stream.error(0)
    return [*entries, *(failed_entries(answer, error) if error else final_entries(answer))]


def _messages(entries: list[ChatEntry]) -> list[dict[str, Any]]:
    return [entry.message() for entry in entries]
