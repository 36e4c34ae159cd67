"""A value that an option cannot have is refused before anything is imported, downloaded, loaded or written."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer.models

from adapterhub.cli.commands import SECTIONS, Command, Group, examples
from adapterhub.cli.options import check_url
from serve.config import VllmConfig

NONSENSE = {
    "--adapter": "=x",
    "--allowed-host": "https://tools.example/",
    "--api-keys": "no-such-file",
    "--base": "no base",
    "--device": "tpu",
    "--endpoint": "nonsense",
    "--expect": "sha256:xyz",
    "--fields": "winner",
    "--from": "ftp://a",
    "--hub": "http://",
    "--name": "no name",
    "--nodes": "many",
    "--plot": "plot.txt",
    "--recipe": "no-such-recipe",
    "--rendezvous": "here",
    "--resume": "no-such-run",
    "--root": "no-such-hub",
    "--store": "no-such-store",
    "--to": "http://host:port",
    "--url": "localhost:8000",
    "--verdicts": "A=left",
    "--winner-codes": "A=left",
    "--vllm-python": "./no-such-python",
    "--weight": "captain=0",
    "--pin": "nobody",
}
"""Option of text or path -> a value it refuses. Enums, numbers and existing files are found in the signatures."""
UNCHECKED = {
    "chat --prompt": "any text",
    "chat --system": "any text",
    "demo --work": "a folder to create",
    "feedback export --adapter": "a filter: nothing matches",
    "feedback export --output": "a file to write",
    "hub serve --host": "asked of the operating system, which opens the port",
    "hub serve --root": "a folder to create",
    "improve --output": "a folder to create",
    "list --base": "a filter: nothing matches",
    "lock --output": "a file to write",
    "pack --base": "read after the folder's own record",
    "pack --licence": "any identifier",
    "pack --license": "any identifier",
    "pack --output": "a folder to create",
    "pack --stop": "any text",
    "page --host": "asked of the operating system, which opens the port",
    "search --base": "a filter: nothing matches",
    "serve --host": "asked of the operating system, which opens the port",
    "serve --vllm-arg": "vLLM's own",
    "improve --store": "read after the adapter",
    "train --output": "a folder to create",
    "verify --base": "read after the adapter",
}
"""Command and option -> why no value is refused up front."""


@dataclass(frozen=True)
class Case:
    """One command line with one bad value."""

    command: str
    option: str
    value: str
    expected: tuple[str, ...]
    """Words that the message must contain."""

    @property
    def words(self) -> list[str]:
        """The arguments: the bad option first, so that nothing else is looked at before it."""
        count = len(self.command.split())
        rest = shlex.split(examples()[self.command])[1 + count :]
        if self.option in rest:
            at = rest.index(self.option)
            del rest[at : at + 2]
        return [*self.command.split(), f"{self.option}={self.value}", *rest]


def _commands() -> Iterator[tuple[str, Command]]:
    for entries in SECTIONS.values():
        for name, entry in entries.items():
            if isinstance(entry, Group):
                yield from ((f"{name} {inner}", command) for inner, command in entry.commands.items())
            else:
                yield name, entry


def _options(command: Command) -> Iterator[tuple[str, type, typer.models.OptionInfo]]:
    """(option, type of one value, declaration) of every option that takes a value."""
    module, _, name = command.function.partition(":")
    function = getattr(import_module(f"adapterhub.cli.{module}"), name)
    for parameter, hint in get_type_hints(function, include_extras=True).items():
        info = next(
            (one for one in getattr(hint, "__metadata__", ()) if isinstance(one, typer.models.OptionInfo)), None
        )
        kind = get_args(hint)[0] if info else None
        while get_args(kind):  # X | None, list[X]
            kind = get_args(kind)[0]
        if info is not None and kind is not bool:
            given = (info.default, *(info.param_decls or ()))  # in Annotated, the first name is taken for the default
            declared = [word for word in given if isinstance(word, str) and word.startswith("--")]
            yield (declared or [f"--{parameter.replace('_', '-')}"])[0], kind, info


def _digits(number: float) -> str:
    return str(int(number) if number == int(number) else number)


def _bad_values(kind: type, info: typer.models.OptionInfo) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(value, words of the message) for what the signature alone declares."""
    if issubclass(kind, StrEnum):
        yield "nonsense", tuple(kind)
    elif kind in (int, float):
        yield "nonsense", ("valid integer" if kind is int else "valid number",)
        if info.min is not None:
            yield str(kind(info.min - 1)), (_digits(info.min),)
        if info.max is not None:
            yield str(kind(info.max * 2)), (_digits(info.max),)
        if kind is float:
            yield from ((value, ()) for value in ("nan", "inf", "-inf"))
    elif kind is Path and info.exists:
        yield "no-such-file", ("no-such-file",)


def _cases() -> Iterator[Case]:
    for name, command in _commands():
        for option, kind, info in _options(command):
            found = list(_bad_values(kind, info))
            if not found and f"{name} {option}" not in UNCHECKED:
                assert option in NONSENSE, f"{name} {option}: say what it refuses, or why it refuses nothing"
                found = [(NONSENSE[option], ())]
            yield from (Case(name, option, value, expected) for value, expected in found)


CASES = list(_cases())
_RUN = """
import contextlib, io, json, socket, sys

def no_network(*arguments, **options):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network
from adapterhub.cli.main import main

ended = []
for words in json.load(sys.stdin):
    sys.argv = ["adapterhub", *words]
    said, loaded = io.StringIO(), "torch" in sys.modules
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    ended.append({"code": code, "said": said.getvalue(), "torch": "torch" in sys.modules and not loaded})
json.dump(ended, sys.stdout)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, dict[str, Any]]]:
    """How each command line ended, all run by one process without a network, in a folder that stays as it is."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "captain").mkdir()
    for name in ("votes.jsonl", "captain.pem", "captain.zip"):
        (folder / name).touch()
    before = sorted(folder.iterdir())
    root = str(Path(__file__).parents[3])
    environment = {
        "ADAPTERHUB_HOME": str(folder / "home"), "PATH": "/usr/bin:/bin", "COLUMNS": "1000", "TERMINAL_WIDTH": "1000",
        "PYTHONPATH": root,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _RUN], input=json.dumps([case.words for case in CASES]), capture_output=True, text=True,
        env=environment, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    yield dict(zip(CASES, json.loads(done.stdout), strict=True))
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command} {case.option}={case.value}")
def test_a_bad_value_is_refused_first(case: Case, refusals: dict[Case, dict[str, Any]]) -> None:
    ended = refusals[case]
    assert ended["code"] == 2, ended
    said = " ".join(ended["said"].split())
    assert case.option in said or (case.option in ("--base", "--resume", "--store", "--root") and case.value in said)
    for word in case.expected:
        assert word in said
    assert not ended["torch"]


@pytest.mark.parametrize("name", [name for name, _ in _commands()])
def test_every_number_has_a_minimum_and_a_maximum(name: str) -> None:
    for option, kind, info in _options(dict(_commands())[name]):
        if kind is int:
            assert info.min is not None, option
            assert info.max is not None, option
        elif kind is float:
            assert info.callback is not None, f"{option} takes NaN"


def test_no_option_is_excused_that_is_not_there() -> None:
    known = {f"{name} {option}" for name, command in _commands() for option, _, _ in _options(command)}
    assert set(UNCHECKED) <= known
    assert set(NONSENSE) <= {option.split()[-1] for option in known}


@pytest.mark.parametrize(
    "url",
    [
        "http://hub:8080",
        "https://hub.example/a/b?c=d",
        "HTTPS://Hub.Example",
        "http://user:word@127.0.0.1:1/v1",
        "http://[::1]:8000/v1",
        "http://[fe80::1%eth0]:8000",
        "http://[fe80::1%25eth0]",
    ],
)
def test_urls_of_every_form_are_accepted(url: str) -> None:
    assert check_url([url]) == [url]
    assert VllmConfig(endpoints=(url,)).endpoints == (url,)
