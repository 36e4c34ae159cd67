"""Answers that stream into a visitor's page: started together, drawn as they grow, cancelled from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from serve.client import Answer

REDRAW_S = 0.05
"""Least time between two redraws, in seconds: one costs more than a token of a small model."""


class StreamEnd(Enum):
    """Why a stream was cancelled."""

    STOPPED = "stopped"
    """By the user; the text so far is kept."""
    LEFT = "left"
    """For another conversation, or an empty one: the stream draws that last, after everything it drew before."""
    REPLACED = "replaced"
    """By a newer stream, which draws instead."""


@dataclass
class AnswerStream:
    """Answers to one question, each filled by a task of its own."""

    answers: tuple[Answer, ...]
    tasks: tuple[asyncio.Task[None], ...]
    end: StreamEnd | None = None
    """Why the stream was cancelled; None where it was not."""
    show_instead: Any = None
    """Conversation to draw at the end of a stream that was left."""

    @property
    def is_done(self) -> bool:
        """Return whether every answer is complete, failed or cancelled."""
        return all(task.done() for task in self.tasks)

    def cancel(self, end: StreamEnd, show_instead: Any = None) -> None:
        """Cancel all answers."""
        self.end, self.show_instead = end, show_instead
        for task in self.tasks:
            task.cancel()

    def error(self, index: int) -> str | None:
        """Return the error that the answer at `index` failed with, or None."""
        task = self.tasks[index]
        if not task.done() or task.cancelled():
            return None
        error = task.exception()
        return None if error is None else str(error)


@dataclass
class AnswerStreams:
    """The open streams of one tab, at most one for each session."""

    _by_session: dict[str | None, AnswerStream] = field(default_factory=dict)

    def cancel(self, session: str | None, end: StreamEnd, show_instead: Any = None) -> bool:
        """Cancel the session's stream. Return whether one was open."""
        stream = self._by_session.get(session)
        if stream is not None:
            stream.cancel(end, show_instead)
        return stream is not None

    async def follow(
        self, session: str | None, filled: list[tuple[Answer, Coroutine[Any, Any, None]]]
    ) -> AsyncGenerator[AnswerStream, None]:
        """Start a stream and yield it at once, whenever there is more to draw, and when it is done.

        Closing the generator, as Gradio does when the visitor leaves, cancels the answers.
        """
        self.cancel(session, StreamEnd.REPLACED)
        stream = AnswerStream(
            tuple(answer for answer, _ in filled), tuple(asyncio.create_task(work) for _, work in filled)
        )
        self._by_session[session] = stream
        try:
            yield stream
            drawn = _progress(stream)
            while not stream.is_done:
                await asyncio.wait([task for task in stream.tasks if not task.done()], timeout=REDRAW_S)
                if not stream.is_done and _progress(stream) != drawn:
                    drawn = _progress(stream)
                    yield stream
            if stream.end is not StreamEnd.REPLACED:
                yield stream
        finally:
            for task in stream.tasks:
                task.cancel()
            await asyncio.gather(*stream.tasks, return_exceptions=True)
            if self._by_session.get(session) is stream:
                del self._by_session[session]


def _progress(stream: AnswerStream) -> list[tuple[int, bool]]:
    return [(len(answer.text), task.done()) for answer, task in zip(stream.answers, stream.tasks, strict=True)]
