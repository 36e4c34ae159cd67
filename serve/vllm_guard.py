"""Runs a command, and ends all it started when its own standard input closes: with the server that began it, however
that ends. Standard library only, because it runs in vLLM's Python.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import FrameType

GRACE_S = 10.0


def main(command: list[str]) -> int:
    """The command's exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def signal_all(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)  # vLLM's workers are in its group and outlive its own end

    def end(number: int, frame: FrameType | None) -> None:
        signal_all(signal.SIGTERM)
        threading.Timer(GRACE_S, signal_all, (signal.SIGKILL,)).start()

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        signal_all(signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer
    threading.Thread(target=end_with_parent, daemon=True).start()
    status = child.wait()
    signal_all(signal.SIGKILL)
    os._exit(status if status >= 0 else 1)  # not exit(): the thread above holds standard input


if __name__ == "__main__":
    main(sys.argv[1:])
