"""Commands that a person waits for import few libraries. `benchmarks/startup.py` measures how long they take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TYPER = {"typer", "annotated_doc", "shellingham"}
PYDANTIC = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
"""Typer converts the arguments of a command with it."""
REGISTRY = {"filelock", "platformdirs"}
ALLOWED = {
    "--help": TYPER,
    "--version": TYPER,
    "hub --help": TYPER | PYDANTIC,
    "list": TYPER | PYDANTIC | REGISTRY,
    "list --json": TYPER | PYDANTIC | REGISTRY,
    "base list": TYPER | PYDANTIC | REGISTRY,
    "gc --dry-run": TYPER | PYDANTIC | REGISTRY,
    "pull --help": TYPER | PYDANTIC,
    "chat --help": TYPER | PYDANTIC,
}
"""Command line -> the only third-party modules it may import."""
_CODE = """
import sys
sys.argv = ["adapterhub", *sys.argv[1:]]
known = set(sys.modules)
from adapterhub.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("modules:", *{name.partition(".")[0] for name in set(sys.modules) - known})
"""


@pytest.mark.parametrize("line", ALLOWED)
def test_a_quick_command_imports_few_libraries(line: str, tmp_path: Path) -> None:
    environment = {
        "ADAPTERHUB_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *line.split()], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("modules:")[2].split())
    third_party = {name for name in loaded - sys.stdlib_module_names if not name.startswith("_")}
    assert third_party - {"adapterhub"} <= ALLOWED[line]


def test_help_imports_no_command(tmp_path: Path) -> None:
    code = _CODE.replace('name.partition(".")[0] for name', "name for name")
    environment = {"ADAPTERHUB_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, env=environment, check=True
    )
    loaded = {name for name in done.stdout.rpartition("modules:")[2].split() if name.startswith("adapterhub.")}
    assert loaded == {
        "adapterhub.cli", "adapterhub.cli.app", "adapterhub.cli.commands", "adapterhub.cli.main",
        "adapterhub.cli.options", "adapterhub.errors", "adapterhub.extras", "adapterhub.version",
    }  # fmt: skip
