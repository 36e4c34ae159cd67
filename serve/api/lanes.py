"""Threads for work that would block the event loop: one for light and one for heavy work of each kind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

INLINE_SIZE = 4 << 10
"""Size up to which work is done on the event loop, in bytes or characters: waking a thread would take longer."""
LIGHT_SIZE = 16 << 10
"""Size up to which work is light, in bytes or characters: a few milliseconds, without waiting for heavy work."""
SHORT_S = 0.002
"""Time of work that needs no rest after it, in seconds."""
REST = 3.0
"""Rest after work that held the interpreter's lock longer than SHORT_S, as a multiple of its time.

The engine's thread and the event loop need the lock too.
"""


class Lanes:
    """A lane for light and one for heavy work. Heavy work waits its turn there, however many requests bring it."""

    def __init__(self) -> None:
        self._computing = {is_light: _Lane(rest=REST) for is_light in (True, False)}
        self._tokenizing = {is_light: _Lane(rest=0.0) for is_light in (True, False)}

    async def compute(
        self, size: int, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Run work that holds the interpreter's lock while it runs (JSON, templates)."""
        return await self._computing[size <= LIGHT_SIZE].run(lambda: work(*args, **kwargs))

    async def tokenize(
        self, size: int, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Run work that releases the interpreter's lock while it runs."""
        return await self._tokenizing[size <= LIGHT_SIZE].run(lambda: work(*args, **kwargs))


class _Lane:
    """One thread. Work that is cancelled while it waits never runs; work that has started runs to its end."""

    def __init__(self, *, rest: float) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="lane")
        self._rest = rest
        self._rests_until = 0.0

    async def run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._rested, work)

    def _rested(self, work: Callable[[], Result]) -> Result:
        # The rest comes before the next work, so that the result of this one returns at once.
        time.sleep(max(0.0, self._rests_until - time.monotonic()))
        begun = time.thread_time()
        try:
            return work()
        finally:
            took = time.thread_time() - begun
            self._rests_until = time.monotonic() + self._rest * took if took > SHORT_S else 0.0
