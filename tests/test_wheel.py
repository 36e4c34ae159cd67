"""The wheel: whole, working outside the checkout, and without its extras still a registry client that names them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from hub_fixtures import start_hub
from packages import write_package
from packaging.requirements import Requirement

from adapterhub.version import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("adapterhub", "train", "serve")
SITE_PACKAGES = Path(pytest.__file__).parent.parent


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it, and nothing of the checkout."""

    folder: Path
    work: Path

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program = self.folder / "bin" / command[0]
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        home = {"ADAPTERHUB_HOME": str(self.work / "home"), "HOME": str(self.work), "PATH": path}
        return subprocess.run(
            [program, *command[1:]], cwd=self.work, env=home | variables, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def output(self, *command: str, **variables: str) -> str:
        done = self.run(*command, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for a build leaves its traces where it runs."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _pip(output, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(output), str(source))
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def everything(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel beside all packages that these tests run with."""
    environment = _environment(wheel, tmp_path_factory.mktemp("everything"))
    (_site(environment) / "all.pth").write_text(f"{SITE_PACKAGES}\n")
    return environment


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel beside what `pip install adapterhub` brings, links to the packages installed here."""
    environment = _environment(wheel, tmp_path_factory.mktemp("core"))
    site = _site(environment)
    for one in _closure("adapterhub", Distribution.at(next(site.glob("adapterhub-*.dist-info")))):
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))))
    return environment


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.partition("/")[0] in PACKAGES}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == wanted


def test_version_is_written_once(wheel: Path) -> None:
    assert wheel.name.startswith(f"adapterhub-{__version__}-")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project.get("version"), project["dynamic"]) == (None, ["version"])


def test_the_wheel_works_outside_the_checkout(everything: Environment) -> None:
    code = (
        "import adapterhub, train, serve\n"
        "from serve.local_engine.cpu.kernels import load_kernels\n"
        "kernels, choice = load_kernels()\n"
        "print(adapterhub.__file__, choice.value, choice.reason)"
    )
    said = everything.output("python", "-c", code)
    assert said.startswith(str(everything.folder))
    if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        assert " own compiled by" in said
    assert everything.output("adapterhub", "--version") == f"adapterhub {__version__}\n"
    assert "demo-captain" in everything.output("adapterhub", "recipes")


def test_the_core_has_neither_torch_nor_gradio(core: Environment) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'gradio', 'fastapi', 'openai') if u.find_spec(n)])"
    assert core.output("python", "-c", code) == "[]\n"


def test_the_core_is_a_registry_client(core: Environment, tmp_path: Path) -> None:
    folder = str(write_package(tmp_path / "small"))
    digest = core.output("adapterhub", "verify", folder).strip()
    assert digest.startswith("sha256:")
    core.output("adapterhub", "add", folder, "--name", "small")
    assert "small" in core.output("adapterhub", "list")
    assert digest in core.output("adapterhub", "inspect", "small")
    with start_hub(tmp_path / "hub") as url:
        token = (tmp_path / "hub" / "token").read_text().strip()
        core.output("adapterhub", "push", "small", "me/small", HF_ENDPOINT=url, HF_TOKEN=token)
        core.output("adapterhub", "pull", "me/small", "--hub", url)
    assert digest in core.output("adapterhub", "resolve", "me/small")
    assert "demo-captain" in core.output("adapterhub", "recipes")
    assert "Usage" in core.output("adapterhub", "--help")


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("train demo-captain", "train"),
        ("serve --base ./base", "serve"),
        ("chat -p Hi", "serve"),
        ("page", "ui"),
        ("hub serve", "hubserver"),
    ],
)
def test_command_without_its_extra_names_it(core: Environment, command: str, extra: str) -> None:
    (core.work / "base").mkdir(exist_ok=True)
    (core.work / "base" / "config.json").write_text("{}")
    (core.work / "base" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = core.run("adapterhub", *command.split())
    called = "hub serve" if command == "hub serve" else command.split()[0]
    wanted = f"adapterhub: 'adapterhub {called}' needs the {extra} extra: pip install 'adapterhub[{extra}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


def test_doctor_shows_which_extras_are_missing(core: Environment) -> None:
    done = core.run("adapterhub", "doctor")
    assert "without train, serve, ui, hubserver" in done.stdout
    assert "pip install 'adapterhub[train,serve,ui,hubserver]'" in done.stdout


def _pip(folder: Path, *arguments: str) -> None:
    """Run pip where neither the folder nor the path shows it the checkout, which it would take for installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _environment(wheel: Path, folder: Path) -> Environment:
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    python = str(folder / "venv" / "bin" / "python")
    _pip(folder, "--python", python, "install", "--no-deps", "--no-index", "--no-compile", str(wheel))
    (folder / "work").mkdir()
    return Environment(folder / "venv", folder / "work")


def _site(environment: Environment) -> Path:
    return next(environment.folder.glob("lib/python*/site-packages"))


def _closure(name: str, root: Distribution) -> Iterator[Distribution]:
    """Everything that pip would install beside `root`, as installed here, each distribution once."""
    seen: set[tuple[str, str]] = set()
    waiting = [(root, "")]
    while waiting:
        one, extra = waiting.pop()
        if one is not root:
            yield one
        for line in one.requires or ():
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
                continue
            assert wanted.name != name, "the core needs no extra of its own"
            for asked in ("", *wanted.extras):
                if (wanted.name.lower(), asked) not in seen:
                    seen.add((wanted.name.lower(), asked))
                    waiting.append((distribution(wanted.name), asked))
