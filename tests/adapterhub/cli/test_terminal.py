"""What others wrote does not act on a terminal, whichever command prints it."""

from __future__ import annotations

import ast
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from packages import write_manifest, write_package
from road import run, run_any

import adapterhub.cli
from adapterhub.cli.options import say, show, show_json, table
from adapterhub.errors import UsageError, printable
from serve.terminal import console

HOSTILE = {
    "clears-the-screen": "x\x1b[2J\x1b[H",
    "sets-the-title": "x\x1b]0;owned\x07",
    "fills-the-clipboard": "x\x1b]52;c;ZXZpbA==\x1b\\",
    "forges-a-line": "x\nsignature      by key 0000",
    "goes-back": "x\rsigned\x08\x08",
    "c1-sequence": "x\x9b2J\x85",
    "turns-text-around": "x\u202egnp.exe\u2066\u2069",
    "line-separator": "x\u2028y\u2029",
    "delete": "x\x7f",
    "invisible": "x\u200b\u2060\ufeff",
    "half-a-pair": "x\ud800",
}


def _is_plain(text: str) -> bool:
    return not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in text.replace("\n", ""))


def _table(text: str) -> None:
    table([{"name": text, "text": None}, {"name": "y", "text": text}], False, empty="")


def _table_as_json(text: str) -> None:
    table([{"name": text}], True, empty="")


PRINTERS = [say, show, show_json, console.say, _table, _table_as_json]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("printer", PRINTERS)
def test_a_line_stays_a_line(printer: Callable[[str], None], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    printer("plain")
    lines = "".join(capsys.readouterr()).count("\n")
    printer(text)
    told = "".join(capsys.readouterr())
    assert _is_plain(told)
    assert told.count("\n") == lines
    assert "x" in told


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_an_error_is_one_line(text: str) -> None:
    assert _is_plain(str(UsageError(text)))
    assert "\n" not in str(UsageError(text))


def test_text_that_only_looks_foreign_is_printed_as_it_is() -> None:
    for text in ("Größe", "日本語", "مرحبا", "a b", "é"):
        assert printable(text) == text


def test_json_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    show_json(list(HOSTILE.values()))
    assert json.loads(capsys.readouterr().out) == list(HOSTILE.values())


def test_a_hostile_manifest_in_the_commands_that_show_it(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    hostile = "".join(text for name, text in HOSTILE.items() if name != "half-a-pair")
    write_manifest(package, name=hostile, base_id=f"owner/{hostile}")
    home = tmp_path / "home"
    run("add", str(package), "--name", "captain", home=home)
    other = str(write_package(tmp_path / "other", seed=1))
    for command in (["inspect", "captain"], ["verify", "captain"], ["diff", other, "captain"], ["list"], ["search"]):
        done = run_any(*command, home=home)
        assert done.returncode == 0
        assert _is_plain(done.stdout + done.stderr), command
        assert "signature      by key" not in done.stdout.splitlines()


def test_commands_print_only_through_the_helpers() -> None:
    """Rows of feedback are JSON Lines, written as they are stored."""
    folder = Path(adapterhub.cli.__file__).parent
    allowed = {"options.py", "app.py", "main.py", "serving/feedback.py"}
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.echo", "print", "sys.stdout.write")
    }
    assert found <= allowed
