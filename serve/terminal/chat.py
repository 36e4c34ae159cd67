"""Chat in a terminal: one message from the command line, or a conversation with commands."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub.errors import AdapterHubError, ServeError, UsageError
from adapterhub.files import expanded, raise_storage_full
from serve.client import Answer, Sampling, Turn, to_send
from serve.terminal.client import ChatApi
from serve.terminal.console import BLOCK, history, read, read_any_bytes, say, write

_RANGES: dict[str, tuple[type[float] | type[int], float, float]] = {
    "temperature": (float, 0.0, 2.0),
    "top_p": (float, 0.01, 1.0),
    "max_tokens": (int, 1, 1_000_000),
    "seed": (int, 0, 2**63 - 1),
}
"""Parameter of /set -> its type, least and greatest value."""


@dataclass(frozen=True)
class ChatOptions:
    """Server, model and sampling of a chat. `url` ends in /v1; a `model` of None is the base."""

    url: str
    model: str | None
    system: str | None
    sampling: Sampling


def run_chat(options: ChatOptions, *, prompt: str | None, as_json: bool = False) -> None:
    """Answer `prompt`, followed by the piped input; without a prompt, hold a conversation until Ctrl+D.

    `as_json` prints the answer and its figures as one JSON object. Raises AdapterHubError, in a conversation only
    before the first message: AdapterNotFound, NotAuthorized, RequestTooLong, UsageError for a request that the server
    refuses, ServeError where no server responds or its answer breaks off.
    """
    read_any_bytes()
    message = None if prompt is None else _with_piped_input(prompt)
    with contextlib.closing(ChatApi(options.url)) as api:
        chat = TerminalChat(api, options)
        if message is None:
            chat.converse()
        else:
            chat.answer_once(message, as_json=as_json)


def _with_piped_input(prompt: str) -> str:
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    message = "\n\n".join(part for part in (prompt, piped) if part)
    if not message:
        raise UsageError("the prompt is empty: expected text. Pass --prompt TEXT, or pipe text in.")
    return message


class TerminalChat:
    """One conversation: its turns, the model of the next answer, and the commands."""

    def __init__(self, api: ChatApi, options: ChatOptions) -> None:
        self._api = api
        self._options = options
        self._turns: list[Turn] = []
        self._answers: list[Answer] = []
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/adapter": (self._switch, "NAME", "switch to adapter NAME, or to the base by its name"),
            "/adapters": (self._list, "", "list the models"),
            "/compare": (self._compare, "NAMES", "show other models' answers to the last message"),
            "/system": (self._set_system, "TEXT", "set the system prompt; without TEXT, remove it"),
            "/set": (self._set, "KEY VALUE", f"set {', '.join(_RANGES)}; without KEY, show them"),
            "/undo": (self._undo, "", "remove the last message and its answer"),
            "/retry": (self._retry, "", "answer the last message again"),
            "/clear": (self._clear, "", "remove the conversation"),
            "/good": (lambda _: self._thumb("up"), "", "send thumbs up for the last answer"),
            "/bad": (lambda _: self._thumb("down"), "", "send thumbs down for the last answer"),
            "/correct": (self._correct, "TEXT", "send TEXT as the correction of the last answer, and continue from it"),
            "/save": (self._save, "FILE", "append the conversation to FILE as one JSONL line of training data"),
            "/stats": (self._stats, "", "show the speed of the last answer, and totals"),
            "/help": (self._help, "", "show this list"),
            "/quit": (self._quit, "", "end the chat, like Ctrl+D"),
        }

    def answer_once(self, message: str, *, as_json: bool) -> None:
        """Print the answer to one message."""
        self._turns.append(Turn("user", message))
        if not as_json:
            self._answer()
            return
        answer = self._filled(self._options.model or self._base(), show=lambda delta: None)
        print(json.dumps(_figures(answer), ensure_ascii=False))

    def converse(self) -> None:
        """Read messages and print answers until the input ends. An error is printed, and the chat continues."""
        if self._options.model is None:
            self._options = replace(self._options, model=self._base())
        else:
            self._api.check(self._options.model)
        say(f"{self._options.model} at {self._api.url}; /help lists the commands, Ctrl+D ends")
        with history():
            while (line := read(f"{self._options.model}> ")) is not None:
                try:
                    self._handle(line.strip())
                except EOFError:
                    return
                except AdapterHubError as error:
                    say(str(error))
                except OSError as error:
                    say(f"{error.strerror or error} ({error.filename})")

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
            raise UsageError(
                f"unknown command {name}: expected one of /help. Did you mean {near[0]}? // starts a message with /."
            )
        return self._commands[name][0]

    def _answer_until_interrupted(self) -> None:
        try:
            self._answer()
        except KeyboardInterrupt:
            say("[stopped; the text so far is kept]")

    def _answer(self) -> None:
        """Print the answer to the last message as it arrives, and keep its text however it ends."""
        answer = Answer(self._options.model or self._base())
        try:
            self._fill(answer, show=write)
        finally:
            if answer.text:
                write("\n")
                self._turns.append(Turn("assistant", answer.text))
                self._answers.append(answer)

    def _filled(self, model: str, *, show: Callable[[str], None]) -> Answer:
        answer = Answer(model)
        self._fill(answer, show=show)
        return answer

    def _fill(self, answer: Answer, *, show: Callable[[str], None]) -> None:
        messages = to_send(self._options.system, self._turns)
        with contextlib.closing(self._api.stream(answer, messages, self._options.sampling)) as deltas:
            for delta in deltas:
                show(delta)

    def _base(self) -> str:
        models = self._api.models()
        if not models:
            raise ServeError(f"the server at {self._api.url} lists no model: expected at least the base. See its log.")
        return models[0].name

    # Commands

    def _switch(self, name: str) -> None:
        if not name:
            raise UsageError("/adapter has no NAME: expected a model. List them with /adapters.")
        self._api.check(name)
        self._options = replace(self._options, model=name)
        if not sys.stdin.isatty():
            say(f"switched to {name}")

    def _list(self, _: str) -> None:
        for model in self._api.models():
            mark = "*" if model.name == self._options.model else " "
            kind = "base" if model.is_base else f"rank {model.rank}, {(model.digest or '')[:19]}"
            say(f"{mark} {model.name} ({kind})")

    def _compare(self, names: str) -> None:
        """Show other models' answers without adding them to the conversation."""
        if not names:
            raise UsageError("/compare has no NAMES: expected models. List them with /adapters.")
        turns, answers = list(self._turns), list(self._answers)
        self._remove_answer()
        try:
            for name in names.split():
                say(f"-- {name}")
                answer = self._filled(name, show=write)
                write("\n")
                say(f"   {answer.figures()}")
        except KeyboardInterrupt:
            say("[stopped]")
        finally:
            self._turns, self._answers = turns, answers

    def _set_system(self, text: str) -> None:
        self._options = replace(self._options, system=text or None)
        say("system prompt set" if text else "no system prompt")

    def _set(self, argument: str) -> None:
        key, _, value = argument.partition(" ")
        if key and key not in _RANGES:
            raise UsageError(f"unknown parameter {key}: expected {', '.join(_RANGES)}. Use /set KEY VALUE.")
        if key:
            changed: dict[str, Any] = {key: _number(key, value.strip())}
            self._options = replace(self._options, sampling=replace(self._options.sampling, **changed))
        say(", ".join(f"{name} {value}" for name, value in asdict(self._options.sampling).items() if value is not None))

    def _undo(self, _: str) -> None:
        message = self._remove_answer()
        self._turns.pop()
        say(f"removed: {message.text.splitlines()[0]}")

    def _retry(self, _: str) -> None:
        self._remove_answer()
        self._answer_until_interrupted()

    def _remove_answer(self) -> Turn:
        """Remove the last answer. Return the message before it. Raises UsageError where there is none."""
        if not self._turns:
            raise UsageError("there is no message yet: expected one to answer. Write one first.")
        if self._turns[-1].role == "assistant":
            self._turns.pop()
            self._answers.pop()
        return self._turns[-1]

    def _clear(self, _: str) -> None:
        self._turns.clear()
        self._answers.clear()
        say("removed the conversation; adapter and system prompt stay")

    def _thumb(self, thumb: str) -> None:
        answer = self._last_answer()
        self._api.send_feedback("thumb", answer, self._before_answer(), thumb=thumb)
        say(f"sent: thumbs {thumb} for {answer.model}")

    def _correct(self, text: str) -> None:
        if not text:
            raise UsageError("/correct has no TEXT: expected the correct answer. Write it after /correct.")
        answer = self._last_answer()
        self._api.send_feedback("correction", answer, self._before_answer(), text=text)
        self._turns[-1] = Turn("assistant", text)
        say(f"sent: the correction of {answer.model}; the conversation continues from it")

    def _last_answer(self) -> Answer:
        """Return the last answer. Raises UsageError where the last turn is not as a model wrote it."""
        is_answer = bool(self._turns and self._answers) and self._turns[-1].role == "assistant"
        if not is_answer or self._turns[-1].text != self._answers[-1].text:
            raise UsageError("there is no answer to rate: expected one as the last turn. Write a message first.")
        return self._answers[-1]

    def _before_answer(self) -> list[dict[str, str]]:
        return to_send(self._options.system, self._turns[:-1])

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save has no FILE: expected a path. Write it after /save.")
        turns = self._turns if self._turns and self._turns[-1].role == "assistant" else self._turns[:-1]
        if not turns:
            raise UsageError("there is no answer to save: expected at least one. Write a message first.")
        path = expanded(name)
        line = json.dumps({"messages": to_send(self._options.system, turns)}, ensure_ascii=False)
        _append_line(path, line)
        say(f"{path}: 1 conversation added ({len(turns)} messages)")

    def _stats(self, _: str) -> None:
        if not self._answers:
            raise UsageError("there is no answer yet: expected at least one. Write a message first.")
        say(self._answers[-1].summary())
        tokens = sum(answer.num_tokens for answer in self._answers)
        say(f"{len(self._answers)} answers, {tokens} tokens, {len(self._turns)} messages in the conversation")

    def _help(self, _: str) -> None:
        for name, (_act, argument, meaning) in self._commands.items():
            say(f"  {f'{name} {argument}':<15} {meaning}")
        say(f"  {BLOCK:<15} starts and ends a message of several lines")
        say("  Ctrl+C          stop the answer; its text so far is kept")

    def _quit(self, _: str) -> None:
        raise EOFError


def _append_line(path: Path, line: str) -> None:
    """Append a line, after a line break where the file lacks one. Raises StorageFull, with the file unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with raise_storage_full(path), path.open("ab+", buffering=0) as file:  # a buffer would write its rest on close
        if size := file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        left = f"{line}\n".encode()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device
                file.truncate(size)
            raise


def _number(key: str, text: str) -> float | int | None:
    """Return the value for `key`; None for the seed without text, which unsets it."""
    if key == "seed" and not text:
        return None
    kind, least, greatest = _RANGES[key]
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= greatest:
        raise UsageError(
            f"invalid {key} {text!r}: expected a number from {least:g} to {greatest:g}. Use /set {key} VALUE."
        )
    return value


def _figures(answer: Answer) -> dict[str, Any]:
    """Return an answer and its figures for JSON."""
    return {
        "model": answer.model,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.num_tokens,
        "first_token_s": answer.first_token_s,
        "tokens_per_s": answer.tokens_per_s,
    }
