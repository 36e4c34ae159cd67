"""Answers under way in each visitor's page: begun together, drawn as they grow, ended from outside. Knows no widget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from serve.client import Answer

REDRAW_S = 0.05
"""a redraw costs more than a token of a small model: draw at most 20 times a second"""


class Ending(Enum):
    """What becomes of answers that are ended from outside."""

    STOPPED = "stopped"
    LEFT = "left"
    """for another conversation, or none: the run draws that last, since what it drew before may still be on its way"""
    REPLACED = "replaced"
    """by a newer run, which draws"""


@dataclass
class Run:
    """Answers to one question, each filled by a task of its own."""

    answers: tuple[Answer, ...]
    tasks: tuple[asyncio.Task[None], ...]
    ending: Ending | None = None
    left_for: Any = None
    """what to draw in the end of a run that was left"""

    @property
    def is_done(self) -> bool:
        return all(task.done() for task in self.tasks)

    def end(self, ending: Ending, left_for: Any = None) -> None:
        self.ending, self.left_for = ending, left_for
        for task in self.tasks:
            task.cancel()

    def error(self, index: int) -> str | None:
        """What one answer failed with."""
        task = self.tasks[index]
        if not task.done() or task.cancelled():
            return None
        error = task.exception()
        return None if error is None else str(error)


@dataclass
class Runs:
    """By session: a visitor has one run in each tab at most."""

    _of: dict[str | None, Run] = field(default_factory=dict)

    def end(self, session: str | None, ending: Ending, left_for: Any = None) -> bool:
        """Whether there was something to end."""
        run = self._of.get(session)
        if run is not None:
            run.end(ending, left_for)
        return run is not None

    async def follow(
        self, session: str | None, filled: list[tuple[Answer, Coroutine[Any, Any, None]]]
    ) -> AsyncGenerator[Run, None]:
        """Begin, then give the run at once, each time there is more to draw, and when all is over.

        Closing it, as Gradio does when the visitor leaves, cancels what is under way.
        """
        self.end(session, Ending.REPLACED)
        run = Run(tuple(answer for answer, _ in filled), tuple(asyncio.create_task(work) for _, work in filled))
        self._of[session] = run
        try:
            yield run
            drawn = _state(run)
            while not run.is_done:
                await asyncio.wait([task for task in run.tasks if not task.done()], timeout=REDRAW_S)
                if not run.is_done and _state(run) != drawn:
                    drawn = _state(run)
                    yield run
            if run.ending is not Ending.REPLACED:
                yield run
        finally:
            for task in run.tasks:
                task.cancel()
            await asyncio.gather(*run.tasks, return_exceptions=True)
            if self._of.get(session) is run:
                del self._of[session]


def _state(run: Run) -> list[tuple[int, bool]]:
    return [(len(answer.text), task.done()) for answer, task in zip(run.answers, run.tasks, strict=True)]
