"""Turn SIGINT and SIGTERM into a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_ANSWER = b"stopping after this step, with a checkpoint; a second signal stops at once\n"


@dataclass
class StopRequest:
    """Whether a signal asked the run to stop."""

    is_set: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Set the request at the first signal; raise KeyboardInterrupt at the second."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread only
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request.is_set:
            raise KeyboardInterrupt
        request.is_set = True
        os.write(2, _ANSWER)  # print could be interrupted by itself here

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
