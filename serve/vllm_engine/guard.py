"""Run a command, and kill all its processes when standard input closes, that is, when the server that started it ends.

It is the leader of their process group. It uses the standard library only, because it runs in vLLM's Python.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

GRACE_S = 10.0


def main(command: list[str]) -> None:
    """Run `command`; kill the whole process group, this process included, at its end."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end_all() -> None:
        os.killpg(0, signal.SIGKILL)  # this process, too

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        threading.Timer(GRACE_S, end_all).start()

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        end_all()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    threading.Thread(target=end_with_parent, daemon=True).start()
    child.wait()
    end_all()  # vLLM's workers outlive it


if __name__ == "__main__":
    main(sys.argv[1:])
