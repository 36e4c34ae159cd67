"""The progress output of a run."""

from __future__ import annotations

import io
import subprocess
import sys

from adapterhub.package.run_record import RunStep
from train.loop.progress import Lines, TerminalBar, describe, progress_on


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int) -> RunStep:
    return RunStep(step=number, loss=1.5, learning_rate=1e-4, grad_norm=1.0, tokens=500, trained_tokens=50, seconds=0.5)


def test_a_log_gets_a_line_every_tenth_of_the_steps() -> None:
    stream = io.StringIO()
    progress = progress_on(stream)
    for number in range(1, 101):
        progress.step(step(number), of=100)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("step 1/100  loss 1.500  1000 tokens/s (100 trained)  peak ")


def test_a_short_run_gets_every_step() -> None:
    stream = io.StringIO()
    for number in range(1, 4):
        Lines(stream).step(step(number), of=3)
    assert len(stream.getvalue().splitlines()) == 3


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    progress = progress_on(stream)
    assert isinstance(progress, TerminalBar)
    progress.say("[not markup]")
    progress.step(step(1), of=2)
    progress.step(step(2), of=2)
    progress.close()
    assert "[not markup]" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_a_step_of_no_time_is_described() -> None:
    assert "tokens/s" in describe(step(1).model_copy(update={"seconds": 0.0}))


def test_what_the_parent_held_is_no_peak_of_ours() -> None:
    held = bytearray(400 << 20)
    held[:: 4 << 10] = b"x" * len(held[:: 4 << 10])  # pages count once they are written
    code = "from train.loop.progress import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 0 < int(done.stdout) < 400 << 20
