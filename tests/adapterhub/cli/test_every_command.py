"""What holds for every command: an example in its help, JSON that parses where it is offered, 2 for wrong usage."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from packages import write_package
from road import run_any
from typer.testing import CliRunner

from adapterhub.cli.commands import SECTIONS, Group, examples
from adapterhub.cli.main import app
from adapterhub.feedback.store import STORE_NAME, FeedbackAnswer, FeedbackStore, PromptMessage, Thumb
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry


def _commands() -> Iterator[tuple[str, typer.main.TyperCommand]]:
    """(words, command) of each that does something."""

    def walk(command: object, path: tuple[str, ...]) -> Iterator[tuple[str, typer.main.TyperCommand]]:
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            yield " ".join(path), command  # type: ignore[misc]
        for name, sub in (subcommands or {}).items():
            yield from walk(sub, (*path, name))

    return walk(typer.main.get_command(app), ())


COMMANDS = dict(_commands())
EXAMPLES = examples()
WITH_JSON = {name for name, command in COMMANDS.items() if any("--json" in param.opts for param in command.params)}
JSON_IN = {
    "recipes": "recipes --json",
    "memory": "memory llama-7b --json",
    "inspect": "inspect small --json",
    "list": "list --json",
    "ratings": "ratings {votes} --json",
    "doctor": "doctor --json",
    "history": "history small --json",
    "diff": "diff small small --json",
    "base list": "base list --json",
    "search": "search small --json",
    "feedback stats": "feedback stats --json",
}
"""the others have a server, or train: tests/serve/terminal/test_chat.py and tests/train/planning/test_plan.py"""
ELSEWHERE = {"chat", "train"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_is_this_command(name: str) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert shown.output.rstrip().endswith(f"Example: {EXAMPLES[name]}")
    words = shlex.split(EXAMPLES[name])
    assert words[: 1 + len(name.split())] == ["adapterhub", *name.split()]
    known = {option for param in COMMANDS[name].params for option in (*param.opts, *param.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known


def test_the_list_of_commands_says_what_each_says_of_itself() -> None:
    """The table repeats the first line of each help, so that `--help` imports no command."""
    listed = {}
    for entries in SECTIONS.values():
        for name, entry in entries.items():
            listed |= (
                {f"{name} {inner}": one.summary for inner, one in entry.commands.items()}
                if isinstance(entry, Group)
                else {name: entry.summary}
            )
    assert listed == {name: (command.help or "").partition("\n")[0] for name, command in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_ends_with_2(name: str, home: Path) -> None:
    ended = CliRunner().invoke(app, [*name.split(), "--no-such-option"])
    assert ended.exit_code == 2
    assert "--no-such-option" in ended.output


@pytest.mark.parametrize("name", sorted(WITH_JSON - ELSEWHERE))
def test_json_parses(name: str, home: Path, tmp_path: Path) -> None:
    Registry(home).add(open_adapter(write_package(tmp_path / "small")))
    votes = tmp_path / "votes.jsonl"
    votes.write_text(
        '{"model_a": "x", "model_b": "y", "winner": "a"}\n{"model_a": "y", "model_b": "x", "winner": "a"}\n'
    )
    answer = FeedbackAnswer(model="x", text="Hi")
    thumb = Thumb(kind="thumb", messages=[PromptMessage(role="user", content="?")], answer=answer, thumb="up")
    FeedbackStore(home / STORE_NAME).add(thumb, owner="me")
    done = run_any(*JSON_IN[name].format(votes=votes).split(), home=home)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), (list, dict))


def test_doctor_without_gpu_and_network_ends_soon_and_says_what_to_do(home: Path) -> None:
    """An address that answers nothing, as behind a firewall that drops."""
    began = time.monotonic()
    done = run_any("doctor", "--json", home=home, HF_ENDPOINT="http://192.0.2.1", NO_PROXY="*", no_proxy="*")
    assert time.monotonic() - began < 5
    assert done.returncode == 0, done.stderr
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert (found["hub"]["status"], found["bases"]["status"]) == ("warn", "warn")
    assert "adapterhub hub serve" in found["hub"]["fix"]
    assert found["bases"]["fix"] == "adapterhub base pull smollm2-135m-instruct"
    assert found["python"]["status"] == found["packages"]["status"] == found["home"]["status"] == "ok"
    if not Path("/dev/nvidia0").exists():
        assert found["GPU"]["status"] == "warn"
    assert all(finding["fix"] for finding in found.values() if finding["status"] != "ok")


def test_doctor_ends_with_1_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_any("doctor", home=tmp_path / "file" / "home", HF_HUB_OFFLINE="1", PATH=os.defpath)
    assert done.returncode == 1
    assert f"fail  home        {tmp_path}/file/home cannot be written" in done.stdout
    assert "-> set ADAPTERHUB_HOME to a folder that can." in done.stdout


def test_doctor_names_a_damaged_base_and_an_address_that_is_none(home: Path) -> None:
    folder = home / "bases" / "torn"
    folder.mkdir(parents=True)
    (folder / "base.json").write_text("{")
    done = run_any("doctor", "--json", home=home, HF_ENDPOINT="http://hub:port")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert (done.returncode, found["bases"]["status"], found["hub"]["status"]) == (1, "fail", "warn")
    assert "Traceback" not in done.stderr
