"""The contract of `hub_contract.py`, with the client in its default configuration and without Xet."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hub_fixtures import ALICE, PEOPLE, start_hub


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        yield url


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_DISABLE_XET": "1"}], ids=["as it comes", "without Xet"])
def test_client_gets_what_it_asks_for(url: str, tmp_path: Path, settings: dict[str, str]) -> None:
    report = tmp_path / "report.xml"
    contract = Path(__file__).parents[1] / "fixtures" / "hub_contract.py"
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": url,
        "ADAPTERHUB_CONTRACT_HUB": url,
        "ADAPTERHUB_CONTRACT_TOKEN": ALICE,
        **settings,
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={report}", str(contract)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=contract.parents[2])
    assert done.returncode == 0, done.stdout[-8000:]
    tests = ElementTree.parse(report).getroot()[0].attrib
    assert (int(tests["tests"]) >= 55, tests["failures"], tests["errors"], tests["skipped"]) == (True, "0", "0", "0")
