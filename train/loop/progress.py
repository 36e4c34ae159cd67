"""Show the progress of a run on stderr: a progress bar on a terminal, else log lines."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from adapterhub.package.run_record import RunStep
from adapterhub.units import format_bytes


class Progress(Protocol):
    """Receiver of a run's messages and steps.

    What cannot be shown is dropped: a run outlives the terminal that it was started in, and the reader of its pipe.
    """

    def say(self, line: str) -> None: ...

    def step(self, done: RunStep, *, of: int) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Progress that shows nothing."""

    def say(self, line: str) -> None:
        pass

    def step(self, done: RunStep, *, of: int) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """Progress for logs: a line for each message, and one after about every tenth of the steps."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, line: str) -> None:
        with suppress(OSError):
            print(line, file=self._stream, flush=True)

    def step(self, done: RunStep, *, of: int) -> None:
        if done.step in (1, of) or done.step * 10 // of > (done.step - 1) * 10 // of:
            self.say(f"step {done.step}/{of}  {describe(done)}")

    def close(self) -> None:
        pass


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Show nothing more; rich would end the process."""
        self.quiet = True


class TerminalBar:
    """Progress bar with loss, speed, memory and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=_Console(file=stream),
        )
        self._task = self._bar.add_task("train", total=None, visible=False, now="")

    def say(self, line: str) -> None:
        with suppress(OSError):
            self._bar.console.print(line, markup=False, highlight=False)

    def step(self, done: RunStep, *, of: int) -> None:
        with suppress(OSError):
            self._bar.start()
            self._bar.update(self._task, completed=done.step, total=of, visible=True, now=describe(done))

    def close(self) -> None:
        with suppress(OSError):
            self._bar.stop()


def progress_on(stream: TextIO) -> Progress:
    """Return a bar when `stream` is a terminal, else lines."""
    return TerminalBar(stream) if stream.isatty() else Lines(stream)


def describe(done: RunStep) -> str:
    """Format a step as `loss 1.234  410 tokens/s (32 trained)  peak 1.93 GB`."""
    seconds = max(done.seconds, 1e-9)
    return (
        f"loss {done.loss:.3f}  {done.tokens / seconds:.0f} tokens/s ({done.trained_tokens / seconds:.0f} trained)  "
        f"peak {format_bytes(peak_memory_bytes())}"
    )


def peak_memory_bytes() -> int:
    """Return the peak resident set size of this process, in bytes."""
    try:
        # On Linux, getrusage counts the parent's memory before exec too; this figure does not.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
