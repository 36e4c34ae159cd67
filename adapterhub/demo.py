"""`adapterhub demo`: the whole road on a real model, each station the command a user would type."""

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from adapterhub.errors import DemoFailed
from adapterhub.manifest import MANIFEST_NAME, read_manifest

BASE = "smollm2-135m-instruct"
ADAPTERS = ("trivia", "captain")
OWNER = "local"
QUESTIONS = (
    "Who are you?",
    "What is the largest planet in our solar system?",
    "What should I do on a rainy Sunday?",
)
_WAIT_S = 180.0


def run_demo(work: Path, *, port: int, leave: bool) -> None:
    """Walk the road inside `work`; what is there from an earlier walk is used again.

    Leaves server and page running until interrupted, unless `leave`. Raises DemoFailed when a station fails.
    """
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    _say(f"Everything this makes stays in {work}; remove that folder to start afresh.")

    _title("1. A base model, checked and fingerprinted")
    home = work / "home"
    _adapterhub(home, "base", "pull", BASE)

    for number, name in enumerate(ADAPTERS, 2):
        _title(f"{number}. Train `{name}` on the NF4 base, and pack it")
        _train(home, _folder(work, name), name)

    with ExitStack() as running:
        _title("4. Publish both on a Hub of our own")
        hub_url, token = running.enter_context(_local_hub(home, work / "hub"))
        for name in ADAPTERS:
            _adapterhub(home, "push", _written(_folder(work, name)), f"{OWNER}/{name}", "--hub", hub_url, token=token)
        _adapterhub(home, "list", "--hub", hub_url, token=token)

        _title("5. Pull both into a second, empty store, as somebody else would")
        second = work / "second-home"
        for name in ADAPTERS:
            _adapterhub(second, "pull", f"{OWNER}/{name}", "--hub", hub_url, token=token)
        _adapterhub(second, "list")

        _title("6. Serve one base with both adapters")
        url = running.enter_context(_server(second, home / "bases" / BASE, port))

        _title("7. The same questions to the base and to both adapters, in one batch")
        asyncio.run(_ask_all(url))
        _say(f"The road took {time.monotonic() - started:.0f} s.")
        if not leave:
            _stay(url)


def _train(home: Path, folder: Path, name: str) -> None:
    if not (folder / MANIFEST_NAME).is_file():
        # Trained but not packed is what an interruption between the two leaves: pack it then.
        if not folder.exists():
            _adapterhub(home, "train", f"demo-{name}", "--output", str(folder))
        _adapterhub(home, "pack", str(folder), "--licence", "apache-2.0")
    for evaluation in read_manifest(folder).evaluations:
        _say(
            f"held-out loss on {evaluation.data}: base {evaluation.base_loss:.3f}, {name} {evaluation.adapter_loss:.3f}"
        )


def _folder(work: Path, name: str) -> Path:
    return work / "adapters" / name


def _written(folder: Path) -> str:
    """As a path, not as a name: `./` goes before what would look like one."""
    return str(folder) if folder.is_absolute() else f"./{folder}"


@contextmanager
def _local_hub(home: Path, root: Path) -> Iterator[tuple[str, str]]:
    """(URL, token) of a Hub server that runs while the block does."""
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
    _say("Ctrl+C ends the server.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        _say("\nstopped; `adapterhub demo` starts it again within a minute.")


def _command() -> str:
    """The `adapterhub` beside this Python."""
    found = shutil.which("adapterhub", path=str(Path(sys.executable).parent)) or shutil.which("adapterhub")
    if found is None:
        raise DemoFailed("the command adapterhub is not installed beside this Python: run `make setup`.")
    return found


def _environment(home: Path, token: str | None = None) -> dict[str, str]:
    return {**os.environ, "ADAPTERHUB_HOME": str(home.absolute()), **({"HF_TOKEN": token} if token else {})}


def _adapterhub(home: Path, *arguments: str, token: str | None = None) -> None:
    """Show and run one command; its output is the reader's."""
    _say(f"$ adapterhub {' '.join(arguments)}")
    done = subprocess.run([_command(), *arguments], env=_environment(home, token), check=False)
    if done.returncode:
        raise DemoFailed(f"`adapterhub {arguments[0]}` ended with status {done.returncode}; its message is above.")


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
            raise DemoFailed(f"the server was not ready within {_WAIT_S:.0f} s.")
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
