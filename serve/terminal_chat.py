"""Chatting in a terminal: one question from the command line, or a conversation with commands."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import AdapterHubError, NotAuthorized, ServeError, UsageError
from adapterhub.files import write_atomic
from adapterhub.home import home
from serve.chat_client import (
    ANSWER_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    NO_KEY,
    Answer,
    Sampling,
    ServedModel,
    Turn,
    check_complete,
    request_body,
    said_in_one_line,
    to_send,
    trusts_proxy,
)

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLES = ("ADAPTERHUB_API_KEY", "OPENAI_API_KEY")
HISTORY_FILE = "chat_history"
"""questions typed, in ADAPTERHUB_HOME, readable by their owner only"""
HISTORY_LINES = 1000

# An adapter is a stranger's work: its answers must not move the cursor, set the title or fill the clipboard.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class ChatOptions:
    """Where and how to ask. `url` ends in /v1; `model` None is the server's base; a temperature of 0 is greedy."""

    url: str
    model: str | None
    system: str | None
    max_tokens: int
    temperature: float


def run_chat(options: ChatOptions, *, prompt: str | None) -> None:
    """With `prompt`, ask it (and below it what is piped in), print the answer and return; without, talk until Ctrl+D.

    Raises AdapterHubError, in a conversation only before the first question: AdapterNotFound, NotAuthorized,
    RequestTooLong, UsageError for what the server refuses, ServeError where there is none or its answer breaks off.
    """
    question = None if prompt is None else _question(prompt)
    with contextlib.closing(ChatApi(options.url)) as api:
        chat = TerminalChat(api, options)
        if question is None:
            chat.talk()
        else:
            chat.ask_once(question)


def _question(prompt: str) -> str:
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    question = "\n\n".join(part for part in (prompt, piped) if part)
    if not question:
        raise UsageError("the prompt is empty: give --prompt TEXT, or pipe the question in.")
    return question


class ChatApi:
    """The API at `url` for one person, whose key is in the environment."""

    def __init__(self, url: str) -> None:
        from openai import DefaultHttpxClient, OpenAI, Timeout

        self.url = url.rstrip("/")
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), NO_KEY)
        self._client: OpenAI = OpenAI(
            base_url=self.url,
            api_key=key,
            max_retries=0,  # a person sees the refusal and may /retry
            timeout=Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            http_client=DefaultHttpxClient(trust_env=trusts_proxy(self.url)),
        )

    def close(self) -> None:
        self._client.close()

    def models(self) -> list[ServedModel]:
        """The base first, as the server lists them. Raises AdapterHubError."""
        with self._failures_said():
            return [ServedModel.read(model) for model in self._client.models.list().data]

    def check(self, name: str) -> None:
        """Raises AdapterNotFound with the server's nearest names."""
        with self._failures_said():
            self._client.models.retrieve(name)

    def ask(self, answer: Answer, messages: list[dict[str, str]], sampling: Sampling) -> Generator[str, None, None]:
        """The pieces of the answer as they come, counted in `answer`. Raises AdapterHubError."""
        with self._failures_said(answer):
            stream = self._client.chat.completions.create(**request_body(answer.model, messages, sampling))
            with stream:
                for chunk in stream:
                    already = len(answer.text)
                    answer.saw(chunk)
                    yield answer.text[already:]
        check_complete(answer, self.url)

    @contextlib.contextmanager
    def _failures_said(self, answer: Answer | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            said = said_in_one_line(error, self.url, has_begun=answer is not None and bool(answer.text))
            if isinstance(said, NotAuthorized):
                said = NotAuthorized(f"{said} The key is read from {' or '.join(KEY_VARIABLES)}.")
            raise said from error


class TerminalChat:
    """One conversation: the turns so far, who answers next, and the commands."""

    def __init__(self, api: ChatApi, options: ChatOptions) -> None:
        self._api = api
        self._options = options
        self._turns: list[Turn] = []
        self._answers: list[Answer] = []
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/adapter": (self._switch, "NAME", "let NAME answer from now on (the base by its name, too)"),
            "/adapters": (self._list, "", "who can answer"),
            "/system": (self._set_system, "TEXT", "set the system prompt; without TEXT remove it"),
            "/undo": (self._undo, "", "forget the last question and its answer"),
            "/retry": (self._retry, "", "answer the last question again"),
            "/clear": (self._clear, "", "forget the conversation"),
            "/save": (self._save, "FILE", "append the conversation to FILE, as one JSONL line of training data"),
            "/stats": (self._stats, "", "how fast the last answer came, and how much was said"),
            "/help": (self._help, "", "this list"),
            "/quit": (self._quit, "", "end, like Ctrl+D"),
        }

    def ask_once(self, question: str) -> None:
        self._turns.append(Turn("user", question))
        self._answer()

    def talk(self) -> None:
        """Read, answer, repeat, until the input ends. A failure is said, and the conversation goes on."""
        if self._options.model is None:
            self._options = replace(self._options, model=self._base())
        else:
            self._api.check(self._options.model)
        _say(f"{self._options.model} at {self._api.url}; /help lists the commands, Ctrl+D ends")
        with _history():
            while (line := self._read()) is not None:
                try:
                    self._handle(line.strip())
                except EOFError:
                    return
                except AdapterHubError as error:
                    _say(str(error))
                except OSError as error:
                    _say(f"{error.strerror or error} ({error.filename})")

    def _read(self) -> str | None:
        while True:
            try:
                return input(f"{self._options.model}> " if sys.stdin.isatty() else "")
            except EOFError:
                if sys.stdin.isatty():
                    _say("")
                return None
            except KeyboardInterrupt:
                _say("")  # drops the line, as a shell does

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line.partition(" ")
            self._command(name)(argument.strip())
        elif line:
            self._turns.append(Turn("user", line.removeprefix("/") if line.startswith("//") else line))
            self._answer_until_interrupted()

    def _command(self, name: str) -> Callable[[str], None]:
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1) or ["/help"]
            raise UsageError(f"there is no {name}: did you mean {near[0]}? (// sends a line that begins with /)")
        return self._commands[name][0]

    def _answer_until_interrupted(self) -> None:
        try:
            self._answer()
        except KeyboardInterrupt:
            _say("[stopped; what came is kept]")

    def _answer(self) -> None:
        """Print the answer to the last question as it comes, and keep what came however it ends."""
        answer = Answer(self._options.model or self._base())
        sampling = Sampling(self._options.temperature, self._options.max_tokens)
        try:
            messages = to_send(self._options.system, self._turns)
            with contextlib.closing(self._api.ask(answer, messages, sampling)) as pieces:
                for piece in pieces:
                    _write(piece)
        finally:
            if answer.text:
                _write("\n")
                self._turns.append(Turn("assistant", answer.text))
                self._answers.append(answer)

    def _base(self) -> str:
        models = self._api.models()
        if not models:
            raise ServeError(f"the server at {self._api.url} has no model.")
        return models[0].name

    # Commands

    def _switch(self, name: str) -> None:
        if not name:
            raise UsageError("/adapter needs a NAME: /adapters lists them.")
        self._api.check(name)
        self._options = replace(self._options, model=name)
        if not sys.stdin.isatty():
            _say(f"{name} answers from now on")

    def _list(self, _: str) -> None:
        for model in self._api.models():
            mark = "*" if model.name == self._options.model else " "
            kind = "base" if model.is_base else f"rank {model.rank}, {(model.digest or '')[:19]}"
            _say(f"{mark} {model.name} ({kind})")

    def _set_system(self, text: str) -> None:
        self._options = replace(self._options, system=text or None)
        _say("system prompt set" if text else "no system prompt")

    def _undo(self, _: str) -> None:
        question = self._forget_answer()
        self._turns.pop()
        _say(f"forgot: {question.text.splitlines()[0]}")

    def _retry(self, _: str) -> None:
        self._forget_answer()
        self._answer_until_interrupted()

    def _forget_answer(self) -> Turn:
        """Leave the last question as the last turn. Raises UsageError where there is none."""
        if not self._turns:
            raise UsageError("nothing was asked yet.")
        if self._turns[-1].role == "assistant":
            self._turns.pop()
        return self._turns[-1]

    def _clear(self, _: str) -> None:
        self._turns.clear()
        self._answers.clear()
        _say("forgot everything; adapter and system prompt stay")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs a FILE.")
        turns = self._turns if self._turns and self._turns[-1].role == "assistant" else self._turns[:-1]
        if not turns:
            raise UsageError("there is no answer to save yet.")
        path = Path(name).expanduser()
        before = path.read_text() if path.exists() else ""
        gap = "\n" if before and not before.endswith("\n") else ""
        line = json.dumps({"messages": to_send(self._options.system, turns)}, ensure_ascii=False)
        write_atomic(path, f"{before}{gap}{line}\n")
        _say(f"{path}: 1 conversation added ({len(turns)} messages)")

    def _stats(self, _: str) -> None:
        if not self._answers:
            raise UsageError("nothing was answered yet.")
        _say(self._answers[-1].summary())
        tokens = sum(answer.num_tokens for answer in self._answers)
        _say(f"{len(self._answers)} answers, {tokens} tokens, {len(self._turns)} messages in the conversation")

    def _help(self, _: str) -> None:
        for name, (_act, argument, meaning) in self._commands.items():
            _say(f"  {f'{name} {argument}':<15} {meaning}")
        _say("  Ctrl+C          stop the answer; what came is kept")

    def _quit(self, _: str) -> None:
        raise EOFError


def _say(line: str) -> None:
    """A note for the reader, kept apart from the answers."""
    print(line, file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with the questions of earlier conversations, where there is a terminal and readline."""
    try:
        import readline
    except ImportError:  # Windows
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    path = home() / HISTORY_FILE
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        # A conversation does not fail for its history.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
