"""Threads for work that would hold up the event loop, few enough that no crowd of requests takes them from each other.

Knows nothing of requests: what is given here is a function and the size of what it works on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made")

INLINE_SIZE = 4 << 10
"""bytes or characters that are worked on at once: a thread would take longer to be woken than the work takes"""
LIGHT_SIZE = 16 << 10
"""bytes or characters up to which work takes a few milliseconds and never waits for larger work"""
SHORT_S = 0.002
REST = 3.0
"""what follows work that held the interpreter for more than SHORT_S, as a multiple of it: the engine's thread and the
event loop need the interpreter, too"""


class Lanes:
    """A lane for light work and one for heavy work, which waits its turn there however many requests bring it."""

    def __init__(self) -> None:
        self._computing = {is_light: _Lane(rest=REST) for is_light in (True, False)}
        self._tokenizing = {is_light: _Lane(rest=0.0) for is_light in (True, False)}

    async def compute(self, size: int, work: Callable[Given, Made], *given: Given.args, **named: Given.kwargs) -> Made:
        """Run work that holds the interpreter's lock while it runs (JSON, templates)."""
        return await self._computing[size <= LIGHT_SIZE].run(lambda: work(*given, **named))

    async def tokenize(self, size: int, work: Callable[Given, Made], *given: Given.args, **named: Given.kwargs) -> Made:
        """Run work that gives the interpreter's lock back while it runs."""
        return await self._tokenizing[size <= LIGHT_SIZE].run(lambda: work(*given, **named))


class _Lane:
    """One thread. Work that is cancelled while it waits never runs; what runs already runs on, for nobody."""

    def __init__(self, *, rest: float) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="lane")
        self._rest = rest
        self._rests_until = 0.0

    async def run(self, work: Callable[[], Made]) -> Made:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._rested, work)

    def _rested(self, work: Callable[[], Made]) -> Made:
        # Before the next work, not after this one: whoever waits for this one has it at once.
        time.sleep(max(0.0, self._rests_until - time.monotonic()))
        begun = time.thread_time()
        try:
            return work()
        finally:
            took = time.thread_time() - begun
            self._rests_until = time.monotonic() + self._rest * took if took > SHORT_S else 0.0
