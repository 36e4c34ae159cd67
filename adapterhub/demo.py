"""The demo: every step from base model to chat, each by the command that a user would type."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from adapterhub.errors import DemoFailed
from adapterhub.net import listen
from adapterhub.package.manifest import MANIFEST_NAME, read_manifest
from adapterhub.units import format_duration

BASE = "smollm2-135m-instruct"
ADAPTERS = ("trivia", "captain")
OWNER = "local"
QUESTIONS = (
    "Who are you?",
    "What is the largest planet in our solar system?",
    "What should I do on a rainy Sunday?",
)
_WAIT_S = 180.0
_STOP_S = 20.0
"""Time for an interrupted command to exit, in seconds: a training run finishes its step and writes a checkpoint."""


def run_demo(work: Path, *, port: int, leave: bool) -> None:
    """Run the demo inside `work`, reusing the results of an earlier run.

    Keeps the server and the page running until interrupted, unless `leave` is set. Raises DemoFailed when a step fails,
    and PortBusy before the first step.
    """
    started = time.monotonic()
    # Check the port now, since the server starts last; `port` 0 picks a free one.
    with listen("127.0.0.1", port) as listener:
        port = listener.getsockname()[1]
    work.mkdir(parents=True, exist_ok=True)
    _say(f"All files are kept in {work}; delete that folder to start over.")

    _title("1. Download a base model and check it")
    home = work / "home"
    _adapterhub(home, "base", "pull", BASE)

    _title(f"2. Train {' and '.join(f'`{name}`' for name in ADAPTERS)} on the NF4 base side by side, and pack them")
    _train(home, work)

    with ExitStack() as running:
        _title("3. Publish both on a Hub of our own")
        hub = running.enter_context(_local_hub(home, work / "hub"))
        for name in ADAPTERS:
            _adapterhub(home, "push", _written(_folder(work, name)), f"{OWNER}/{name}", hub=hub)
        _adapterhub(home, "list", hub=hub)

        _title("4. Pull both into a second, empty registry, as another user would")
        second = work / "second-home"
        for name in ADAPTERS:
            _adapterhub(second, "pull", f"{OWNER}/{name}", hub=hub)
        _adapterhub(second, "list")

        _title("5. Serve one base with both adapters")
        url = running.enter_context(_server(second, home / "bases" / BASE, port))

        _title("6. Ask the base and both adapters the same questions, in one batch")
        asyncio.run(_ask_all(url))
        _say(f"The demo took {format_duration(time.monotonic() - started)}.")
        if not leave:
            _stay(url)


def _train(home: Path, work: Path) -> None:
    """Train each adapter in a process with its share of the cores: loading and writing keep only one core busy."""
    lanes = {name: _commands(_folder(work, name), name) for name in ADAPTERS}
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // len(lanes)))} | _environment(home)
    try:
        asyncio.run(_side_by_side(lanes, environment))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    for name in ADAPTERS:
        for evaluation in read_manifest(_folder(work, name)).evaluations:
            losses = f"base {evaluation.base_loss:.3f}, {name} {evaluation.adapter_loss:.3f}"
            _say(f"held-out loss on {evaluation.data}: {losses}")


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commands(folder: Path, name: str) -> list[tuple[str, ...]]:
    """Return the commands that are still needed for a packed adapter: train or resume, pack, or nothing."""
    if (folder / MANIFEST_NAME).is_file():
        return []
    pack = ("pack", str(folder), "--license", "apache-2.0")
    if folder.exists():
        return [pack]
    if any(folder.with_name(f"{name}.run").glob("step-*")):
        return [("train", "--resume", str(folder)), pack]
    return [("train", f"demo-{name}", "--output", str(folder)), pack]


def _folder(work: Path, name: str) -> Path:
    return work / "adapters" / name


def _written(folder: Path) -> str:
    """Return the folder written so that it is read as a path, not as a name."""
    return str(folder) if folder.is_absolute() else f"./{folder}"


@contextmanager
def _local_hub(home: Path, root: Path) -> Iterator[tuple[str, str]]:
    """Run a Hub server during the block; yield its URL and token."""
    (root / "url").unlink(missing_ok=True)
    with _background(home, "hub", "serve", "--root", str(root), "--port", "0") as process:
        _wait_for(
            process, lambda: (root / "url").is_file() and _answers((root / "url").read_text().strip() + "/health")
        )
        yield (root / "url").read_text().strip(), (root / "token").read_text().strip()


@contextmanager
def _server(home: Path, base: Path, port: int) -> Iterator[str]:
    adapters = [part for name in ADAPTERS for part in ("--adapter", f"{name}={OWNER}/{name}")]
    url = f"http://127.0.0.1:{port}"
    with _background(home, "serve", "--base", _written(base), *adapters, "--port", str(port)) as process:
        _wait_for(process, lambda: _answers(f"{url}/ready"))
        yield url


async def _ask_all(url: str) -> None:
    from openai import AsyncOpenAI

    models = (BASE, *ADAPTERS)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def ask(model: str, question: str) -> str:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0
            )
            return answer.choices[0].message.content or ""

        asked = [(question, model) for question in QUESTIONS for model in models]
        answers = await asyncio.gather(*(ask(model, question) for question, model in asked))
    for (question, model), answer in zip(asked, answers, strict=True):
        if model == models[0]:
            _say(f"\n  {question}")
        head = f"    {model:<22} "
        _say(textwrap.fill(" ".join(answer.split()), 110, initial_indent=head, subsequent_indent=" " * len(head)))
    _say("")


def _stay(url: str) -> None:
    _say(f"Chat in the browser:   {url}/ui")
    _say(f"Chat in the terminal:  adapterhub chat captain --url {url}/v1")
    _say(f"Any OpenAI client:     base_url={url}/v1, model=captain")
    _say("Press Ctrl+C to stop the server.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        _say("\nstopped; run `adapterhub demo` to start it again within a minute.")


def _command() -> str:
    """Return the path of the `adapterhub` command beside this Python. Raises DemoFailed."""
    found = shutil.which("adapterhub", path=str(Path(sys.executable).parent)) or shutil.which("adapterhub")
    if found is None:
        raise DemoFailed("the command `adapterhub` is not installed beside this Python: run `make setup`.")
    return found


def _environment(home: Path, hub: tuple[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command; `hub`: URL of a Hub and the token for it."""
    own = {"HF_ENDPOINT": hub[0], "HF_TOKEN": hub[1]} if hub else {}
    return {**os.environ, "ADAPTERHUB_HOME": str(home.absolute()), **own}


def _adapterhub(home: Path, *arguments: str, hub: tuple[str, str] | None = None) -> None:
    """Print and run one command, whose output is shown. Raises DemoFailed."""
    _say(f"$ adapterhub {' '.join(arguments)}")
    done = subprocess.run([_command(), *arguments], env=_environment(home, hub), check=False)
    if done.returncode:
        raise DemoFailed(f"`adapterhub {arguments[0]}` ended with status {done.returncode}; its message is above.")


async def _side_by_side(lanes: dict[str, list[tuple[str, ...]]], environment: dict[str, str]) -> None:
    """Run the commands of each lane one after the other, and the lanes at the same time."""
    async with asyncio.TaskGroup() as running:
        for name, commands in lanes.items():
            running.create_task(_run_lane(f"{name:<{max(map(len, lanes))}} | ", commands, environment))


async def _run_lane(head: str, commands: Sequence[tuple[str, ...]], environment: dict[str, str]) -> None:
    for arguments in commands:
        _say(f"{head}$ adapterhub {' '.join(arguments)}")
        process = await asyncio.create_subprocess_exec(
            _command(), *arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            status = await _shown(head, process)
        except asyncio.CancelledError:
            # Ctrl+C reaches the command as well. A second signal would keep a training run from writing its checkpoint.
            try:
                await asyncio.wait_for(_shown(head, process), _STOP_S)
            except TimeoutError:
                process.terminate()
                await _shown(head, process)
            raise
        if status:
            raise DemoFailed(
                f"`adapterhub {arguments[0]}` ended with status {status}; its message is above, after {head.strip()!r}."
            )


async def _shown(head: str, process: asyncio.subprocess.Process) -> int:
    """Print a command's lines after its lane's name until it exits; return its status."""
    assert process.stdout is not None
    async for line in process.stdout:
        _say(f"{head}{line.decode(errors='replace').rstrip()}")
    return await process.wait()


@contextmanager
def _background(home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    _say(f"$ adapterhub {' '.join(arguments)} &")
    process = subprocess.Popen([_command(), *arguments], env=_environment(home))
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], is_ready: Callable[[], bool]) -> None:
    until = time.monotonic() + _WAIT_S
    while not is_ready():
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with status {process.returncode}; its message is above.")
        if time.monotonic() > until:
            raise DemoFailed(f"the server was not ready within {format_duration(_WAIT_S)}.")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 (our own server's URL)
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _title(text: str) -> None:
    _say(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def _say(line: str) -> None:
    print(line, flush=True)
