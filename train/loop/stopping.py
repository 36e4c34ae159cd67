"""Turn SIGINT, SIGTERM and SIGHUP into a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

_ANSWER = b"stopping after this step, with a checkpoint; only a second Ctrl-C at a terminal stops at once\n"


@dataclass
class StopRequest:
    """Whether a signal asked the run to stop."""

    is_set: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Set the request at the first SIGINT, SIGTERM or SIGHUP; further ones change nothing.

    The exception is a person's: a second Ctrl-C at this process's terminal raises KeyboardInterrupt, and the steps
    since the last checkpoint are lost.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread only
        return
    seen: set[int] = set()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in seen and _is_in_foreground():
            raise KeyboardInterrupt
        is_first = not seen
        seen.add(number)
        request.is_set = True
        if is_first:
            # print could be interrupted by itself here; the reader of a pipe may have ended by the same Ctrl-C.
            with suppress(OSError):
                os.write(2, _ANSWER)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    """Return whether a Ctrl-C at the terminal reaches this process."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
