"""Options and commands that were renamed: the old spelling works, and help does not show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from packages import write_package
from typer.testing import CliRunner

from adapterhub import packer
from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.cli.main import app
from adapterhub.cli.registry import package as package_commands
from adapterhub.errors import UsageError
from adapterhub.package.layout import open_adapter


@pytest.mark.parametrize("option", ["--license", "--licence"])
def test_pack_with_a_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    folder, given = write_package(tmp_path / "small"), dict[str, Any]()

    def pack(folder: Path, **kwargs: Any) -> Adapter:
        given.update(kwargs)
        return open_adapter(folder)

    monkeypatch.setattr(packer, "pack", pack)
    monkeypatch.setattr(package_commands, "base_with", lambda *_: StoredBase(tmp_path, BaseRef("owner/base")))
    done = CliRunner().invoke(app, ["pack", str(folder), "--base", "owner/base", option, "mit"])
    assert done.exit_code == 0, done.exception
    assert given["license"] == "mit"


def test_inspect_prints_old_keys_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_HOME", str(tmp_path / "home"))
    folder = write_package(tmp_path / "small")
    told = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert (told["licence"], told["proof_passed_here"]) == (told["license"], told["probe_passed"])


def test_both_spellings_of_an_option_are_refused(tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    votes.touch()
    for arguments in (
        ["pack", str(tmp_path), "--license", "mit", "--licence", "apache-2.0"],
        ["ratings", str(votes), "--winner-codes", "A=a", "--verdicts", "B=b"],
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, UsageError)
        assert "are the same setting" in str(done.exception)


def test_old_spellings_are_not_in_the_help() -> None:
    shown = CliRunner().invoke(app, ["pack", "--help"], env={"COLUMNS": "200"}).output
    assert "--license" in shown
    assert "--licence" not in shown
