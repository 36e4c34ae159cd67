"""Every file of examples/ runs, on the tiny base: the scripts with their arguments, the notebook cell by cell."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_fixtures import start_hub
from tiny_home import BASE_NAME, make_tiny_home

from adapterhub.adapter import StoredBase
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TESTED = {
    "adapterhub.ipynb",
    "ask_a_server.py",
    "mix.py",
    "pack_and_push.py",
    "switch_per_request.py",
    "train_an_adapter.py",
}
Run = Callable[..., str]


@pytest.fixture(scope="module")
def work(tiny_base: StoredBase, peft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `trained` is an adapter folder, and `captain` is in the registry below it."""
    folder = tmp_path_factory.mktemp("examples")
    make_tiny_home(folder / "home", tiny_base)
    for name in ("trained", "packed"):
        shutil.copytree(peft_folder, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTERHUB_HOME", str(folder / "home"))
        Registry().add(pack(folder / "packed", base=BASE_NAME, name="captain"))
    return folder


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """An example in this process, which has imported already what takes a process of its own seconds."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("ADAPTERHUB_HOME", str(work / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for what an example starts

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        path = EXAMPLES / name
        if path.suffix == ".ipynb":
            _run_cells(path)
        else:
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def _run_cells(path: Path) -> None:
    """Do what a kernel does with the cells of a notebook, in order."""
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == TESTED


def test_no_example_hides_a_package() -> None:
    """`python examples/NAME.py` puts examples/ first on the path: train.py there would be imported as `train`."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {"adapterhub", "train", "serve"} <= packages
    assert not packages & {path.stem for path in EXAMPLES.glob("*.py")}


def test_an_example_runs_as_it_is_typed(work: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "mix.py"), "captain", "./packed"]
    variables = os.environ | {"ADAPTERHUB_HOME": str(work / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
    assert "2 adapters: " in done.stdout, done.stderr


def test_train(run: Run) -> None:
    assert "32 steps" in run("train_an_adapter.py", BASE_NAME, "trained-here")


def test_pack_and_push(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_hub(tmp_path / "hub") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", (tmp_path / "hub" / "token").read_text().strip())
        said = run("pack_and_push.py", "trained", "me/captain")
    assert f"pushed to {url}/me/captain" in said
    assert "pulled and verified" in said


def test_serve(run: Run) -> None:
    said = run("ask_a_server.py", "captain")
    assert "captain: " in said
    assert f"{BASE_NAME}: " in said


def test_switch_per_request(run: Run) -> None:
    said = run("switch_per_request.py", "captain")
    assert said.count("base: ") == 2
    assert said.count("('sha256:") == 2
    lines = [line.partition(": ") for line in said.splitlines()]
    answers = [text for name, _, text in lines if name in (BASE_NAME, "captain")]
    assert answers[0] == answers[2] != answers[1]


def test_mix(run: Run) -> None:
    assert "2 adapters: " in run("mix.py", "captain", "./packed")


def test_notebook(run: Run) -> None:
    assert "captain -> " in run("adapterhub.ipynb")


def test_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "adapterhub.ipynb").read_text())["cells"]
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in ran] == [([], None)] * len(ran)
