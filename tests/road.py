"""The road as commands, on the real base: train briefly, pack, push, pull, serve. For the tests that walk it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMAND = Path(sys.executable).with_name("adapterhub")
NAMES = ("trivia", "captain")
BASE = "smollm2-135m-instruct"

_DATA = {"trivia": 'source = "chatterbot"\ntopic = "trivia"', "captain": 'source = "shipped"\nname = "captain"'}
_RECIPE = """
name = "{name}"
base = "./{base}"
[data]
{data}
held_out = 4
max_length = 96
[lora]
rank = 8
alpha = 16
[train]
steps = 5
batch_size = 4
learning_rate = 2e-3
warmup_steps = 1
max_grad_norm = 1.0
"""


@dataclass(frozen=True)
class ServedRoad:
    """Everything the road left: a running server and Hub, the adapters trained, the stores on both sides."""

    url: str
    hub_url: str
    token: str
    home: Path
    folders: dict[str, Path]
    base: Path


def run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command to its end; asserts success."""
    done = run_any(*arguments, home=home, **environment)
    assert done.returncode == 0, f"adapterhub {' '.join(arguments)}: {done.stderr}"
    return done


def run_any(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, env=_environment(home, environment), check=False
    )


@contextmanager
def background(*arguments: str, home: Path, until: Callable[[], bool], **environment: str) -> Iterator[None]:
    """A server that runs while the block does, entered when `until` is true."""
    log = home / f"{arguments[0]}.log"
    home.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [COMMAND, *arguments], stdout=output, stderr=output, env=_environment(home, environment)
        )
        try:
            deadline = time.monotonic() + 180
            while not until():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def walk_road(work: Path, base: Path, port: int) -> Iterator[ServedRoad]:
    """Two adapters, trained for seconds each, all the way to a server."""
    first, second, hub = work / "first", work / "second", work / "hub"
    (work / base.name).symlink_to(base)
    folders = {}
    for name in NAMES:
        recipe = work / f"{name}.toml"
        recipe.write_text(_RECIPE.format(name=name, base=base.name, data=_DATA[name]).replace("./", f"{work}/"))
        folders[name] = work / "trained" / name
        run("train", str(recipe), "--output", str(folders[name]), home=first)
        run("pack", str(folders[name]), "--base", str(base), "--name", name, "--licence", "apache-2.0", home=first)

    hub_ready = lambda: (hub / "url").is_file() and answers((hub / "url").read_text().strip() + "/health")  # noqa: E731
    with background("hub", "serve", "--root", str(hub), "--port", "0", home=first, until=hub_ready):
        hub_url, token = (hub / "url").read_text().strip(), (hub / "token").read_text().strip()
        for name in NAMES:
            run("push", str(folders[name]), f"local/{name}", "--hub", hub_url, home=first, HF_TOKEN=token)
            run("pull", f"local/{name}", "--hub", hub_url, home=second, HF_TOKEN=token)
        url = f"http://127.0.0.1:{port}"
        adapters = [part for name in NAMES for part in ("--adapter", f"{name}=local/{name}")]
        with background(
            "serve", "--base", str(base), *adapters, "--port", str(port), "--threads", "1",
            home=second, until=lambda: answers(f"{url}/ready"), OMP_NUM_THREADS="1",
        ):  # fmt: skip
            yield ServedRoad(url, hub_url, token, second, folders, base)


def _environment(home: Path, extra: dict[str, str]) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_ENDPOINT")}
    return {**clean, "ADAPTERHUB_HOME": str(home), **extra}
