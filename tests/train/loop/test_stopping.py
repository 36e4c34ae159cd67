"""Stopping a run by signals: asked once, whatever comes how often, and nothing that was acknowledged is lost."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import assert_nothing_lost, recipe_of
from training import WEIGHTS
from typer.testing import CliRunner

from adapterhub.adapter import StoredBase
from adapterhub.cli.main import app
from adapterhub.errors import TrainingStopped
from adapterhub.files import sha256_of
from adapterhub.package.run_record import RunStep
from train.loop.progress import Lines, Silent, TerminalBar
from train.loop.run_folder import run_path

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

MAIN = "from adapterhub.cli.main import main; main()"
IS_LONG = "ADAPTERHUB_SOAK_S" in os.environ
NUM_STOPS = {1: 100, 2: 60} if IS_LONG else {2: 1}
"""Processes of a run -> how often it is stopped. The short form does not resume."""


def write_recipe(folder: Path, base: StoredBase, **train: Any) -> None:
    """Write mine.toml, whose base is a folder."""
    recipe_of(folder, **train)
    file = folder / "mine.toml"
    file.write_text(re.sub('base = ".*"', f'base = "{base.path}"', file.read_text()))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-W", "ignore", "-c", MAIN, "train", *arguments]


def started(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command away from the terminal that the tests may have been started at."""
    return subprocess.Popen(
        command(*arguments), cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def line_with(stream: Any, words: str) -> str:
    """Read up to a line with these words, and return what was read."""
    said = ""
    for line in stream:
        said += line
        if words in line:
            return said
    raise AssertionError(f"ended without {words!r}:\n{said}")


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGHUP)])
def test_a_second_signal_changes_nothing(tmp_path: Path, tiny_base: StoredBase, numbers: Sequence[int]) -> None:
    """Without a terminal nobody presses Ctrl-C twice: a service manager may repeat itself."""
    write_recipe(tmp_path, tiny_base, steps=100_000, checkpoint_every=0)
    child = started(tmp_path, "mine.toml", "--output", "out")
    assert child.stderr is not None
    with child.stderr:
        line_with(child.stderr, "step 1/")
        for number in numbers:
            child.send_signal(number)
        said = child.stderr.read()
    assert child.wait() == 130
    assert said.count("stopping after this step") == 1
    found = re.search(r"stopped after step (\d+) of 100000: resume with `adapterhub train --resume out`", said)
    assert found, said
    assert [path.name for path in run_path(tmp_path / "out").glob("step-*")] == [f"step-{int(found[1]):06d}"]
    assert_nothing_lost(tmp_path / "out")


AT_A_TERMINAL = """
import signal, time
from train.loop.stopping import stop_requests
with stop_requests() as stop:
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted" if stop.is_set else "too early", flush=True)
"""


def test_a_second_ctrl_c_at_a_terminal_stops_at_once() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", AT_A_TERMINAL])
    said = ""

    def until(words: str) -> None:
        nonlocal said
        while words not in said:
            said += os.read(terminal, 1 << 16).decode(errors="replace")

    try:
        until("ready")
        os.kill(pid, signal.SIGTERM)
        until("stopping after this step")
        os.kill(pid, signal.SIGTERM)
        while "interrupted" not in said:
            os.write(terminal, b"\x03")  # two that come before the process looks count as one
            while "interrupted" not in said and select.select([terminal], [], [], 0.5)[0]:
                said += os.read(terminal, 1 << 16).decode(errors="replace")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(pid, 0)[1]
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    ("checkpoint_every", "said"),
    [
        (0, "interrupted: no checkpoint was written. Start the run again."),
        (1, "interrupted: a checkpoint of step 1 is kept. Resume with `adapterhub train --resume "),
    ],
)
def test_an_interrupted_command_reports_what_is_on_disk(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, checkpoint_every: int, said: str
) -> None:
    class AtOnce(Silent):
        def step(self, done: RunStep, *, of: int) -> None:
            if done.step == 2:
                raise KeyboardInterrupt

    write_recipe(tmp_path, tiny_base, checkpoint_every=checkpoint_every)
    monkeypatch.setattr("train.trainer.progress_on", lambda stream: AtOnce())
    done = CliRunner().invoke(app, ["train", str(tmp_path / "mine.toml"), "--output", str(tmp_path / "out")])
    assert isinstance(done.exception, TrainingStopped)
    assert str(done.exception).startswith(said)


@pytest.mark.parametrize("kind", [Lines, TerminalBar])
def test_a_run_outlives_the_reader_of_its_output(kind: Any) -> None:
    """As `train 2>&1 | tee log`, whose Ctrl-C ends tee too."""

    class NoReader(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = kind(NoReader())
    progress.say("one")
    done = RunStep(step=1, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, trained_tokens=1, seconds=1.0)
    progress.step(done, of=1)
    progress.close()


@pytest.mark.parametrize("processes", NUM_STOPS)
def test_stopped_at_random_moments_no_step_is_lost_and_the_bytes_are_the_same(
    tmp_path: Path, tiny_base: StoredBase, processes: int
) -> None:
    draw = random.Random(int(os.environ.get("ADAPTERHUB_SEED", "7")))
    write_recipe(tmp_path, tiny_base, steps=60, checkpoint_every=0, evaluate_every=7)
    launch = ["--launch", str(processes)] if processes > 1 else []
    num_stops = 0
    whole: str | None = None
    while num_stops < NUM_STOPS[processes]:
        output, resumes = tmp_path / f"out-{num_stops}", 0
        while not output.exists():
            can_resume = not launch and any(run_path(output).glob("step-*"))
            arguments = ["--resume", output.name] if can_resume else ["mine.toml", "--output", output.name, *launch]
            child = started(tmp_path, *arguments)
            assert child.stderr is not None
            is_stopped = num_stops < NUM_STOPS[processes] and resumes < 5
            said = ""
            with child.stderr:
                if is_stopped:
                    said += _send(child, draw)
                    num_stops += 1
                said += child.stderr.read()
            code = child.wait()
            if has_begun := "trainable parameters" in said:
                assert "Traceback" not in said or launch, said
            # While Python starts and ends, a signal has its default disposition.
            if has_begun and is_stopped and not output.exists():
                assert "adapterhub: stopped" in said or "adapterhub: interrupted" in said
            assert is_stopped or code == 0, said
            assert_nothing_lost(output)
            if not IS_LONG:
                return
            resumes += 1
        digest = sha256_of(output / WEIGHTS)
        whole = whole or _uninterrupted(tmp_path, launch)
        assert digest == whole
        assert not run_path(output).exists()


def _send(child: subprocess.Popen[str], draw: random.Random) -> str:
    """Send one, two or three signals: mostly from the first step on, else at any moment since the start.

    Return what was printed up to then.
    """
    said = ""
    if draw.random() < 0.8:
        for line in child.stderr or ():
            said += line
            if line.startswith(("step ", "resuming")):
                break
        time.sleep(draw.uniform(0, 0.5))
    else:
        time.sleep(draw.uniform(0, 4))
    for _ in range(draw.randint(1, 3)):
        child.send_signal(draw.choice((signal.SIGTERM, signal.SIGINT)))
        time.sleep(draw.choice((0, draw.uniform(0, 0.1))))
    return said


def _uninterrupted(folder: Path, launch: Sequence[str]) -> str:
    child = started(folder, "mine.toml", "--output", "whole", *launch)
    _, said = child.communicate()
    assert child.returncode == 0, said
    return sha256_of(folder / "whole" / WEIGHTS)
