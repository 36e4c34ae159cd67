"""SIGINT and SIGTERM as a wish to stop, granted between two steps. Writes nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_ANSWER = b"stopping after this step, with a checkpoint; asking once more stops at once\n"


@dataclass
class StopWish:
    """Whether somebody asked the run to stop."""

    is_made: bool = False


@contextmanager
def stop_wishes() -> Iterator[StopWish]:
    """The first signal is a wish; a second one interrupts as Ctrl-C always did."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish  # Python delivers signals to the main thread only
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if wish.is_made:
            raise KeyboardInterrupt
        wish.is_made = True
        os.write(2, _ANSWER)  # print could be interrupted by itself here

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
