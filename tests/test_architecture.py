"""The rules of docs/architecture.md that a syntax tree or a fresh interpreter can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("adapterhub", "train", "serve")
DOORS = {
    "huggingface_hub": {"adapterhub/hub/client.py"},
    "bitsandbytes": {"adapterhub/bases/loading.py"},
    "gradio": {"serve/ui/app.py"},
    "datasets": {"train/data/hf_datasets.py"},
}


def _modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def _imports(path: Path) -> Iterator[str]:
    """Top-level name of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_each_other_in_one_direction_only(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    forbidden = {"adapterhub": {"train", "serve"}, "train": {"serve"}, "serve": {"train"}}[name.split("/")[0]]
    if not name.startswith("adapterhub/cli/"):
        assert not forbidden & set(_imports(path))


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_one_door(library: str) -> None:
    users = {p.relative_to(ROOT).as_posix() for p in _modules() if library in _imports(p)}
    pages = {user for user in users if user.startswith("serve/page_")}
    assert users - pages == DOORS[library]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["base", "list"], ["pull", "--help"]])
def test_quick_commands_load_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['adapterhub', *{arguments!r}]\n"
        "from adapterhub.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'gradio', 'huggingface_hub', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {"ADAPTERHUB_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_scheduler_and_cache_load_no_torch() -> None:
    code = "import sys, serve.local_engine.scheduler, serve.adapters.cache; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
