"""The rules of docs/architecture.md that a syntax tree or a fresh interpreter can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("adapterhub", "train", "serve")
MAX_MODULES = 20
"""in one folder: more than that nobody finds anything in"""

# From the ground up: a module imports its own line and those above it. A name stands for a module or a whole room.
FLOORS = {
    "adapterhub": (
        "errors version extras choice tensor_address strict units svg_plot chat_template end_of_turn",
        "files",
        "net paths package.manifest package.safetensors_header browser_guard",
        "adapter",
        "package",
        "feedback.ratings",
        "hub",
        "bases",
        "compatibility memory",
        "probe",
        "packer",
        "registry",
        "feedback",
        "doctor demo hubserver",
        "cli",
    ),
    "train": (
        "data.conversation data.formats data.oasst data.readers",
        "recipe loop.stopping",
        "distributed data model.fused_lora objectives.losses objectives.forward",
        "model loop.schedule loop.progress loop.run_folder loop.optimizer",
        "objectives",
        "loop",
        "inputs",
        "reporting planning",
        "trainer",
        "worker run",
    ),
    "serve": (
        "engine config",
        "adapters",
        "local_engine vllm_engine training client",
        "api terminal ui",
        "engine_choice",
        "server",
        "llm",
    ),
}
LIBRARIES = {
    "peft": {
        "adapterhub/bases/peft_config.py",
        "adapterhub/probe.py",
        "train/model",
        "train/objectives/forward.py",
        "train/loop/lora_init.py",
    },
    "bitsandbytes": {"adapterhub/bases"},
    "huggingface_hub": {"adapterhub/hub/client.py"},
    "gradio": {"serve/ui"},
    "fastapi": {"adapterhub/hubserver", "serve/api", "serve/server.py", "serve/ui/app.py"},
    "datasets": {"train/data/hf_datasets.py"},
    "llguidance": {"serve/local_engine/guided_decoding.py"},
}
"""library -> the only places that import it"""
SEES_ALL = ("adapterhub.cli", "adapterhub")
"""the command, and the public API, whose names are imported when they are first used"""


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def _imported(path: Path) -> Iterator[str]:
    """Every module a file imports: anywhere in it, also only for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & set(MODULES)
            if names - set(MODULES):
                yield node.module


IMPORTS = {name: set(_imported(path)) for name, path in MODULES.items()}


def _is_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def test_no_import_goes_in_a_circle() -> None:
    ours = {name: imported & set(MODULES) - {name} for name, imported in IMPORTS.items()}
    try:
        TopologicalSorter(ours).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


def _floor(name: str) -> int:
    package, _, rest = name.partition(".")
    rooms = {room: floor for floor, line in enumerate(FLOORS[package]) for room in line.split()}
    found = [room for room in rooms if _is_in(rest, room)]
    assert found, f"{name} stands on no floor: give it or its room a place in FLOORS"
    return rooms[max(found, key=len)]


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name != "__init__.py"])
def test_no_import_climbs_a_floor(name: str) -> None:
    package = name.partition(".")[0]
    own = {other for other in IMPORTS[name] & set(MODULES) if other.startswith(f"{package}.")}
    assert not {other for other in own if MODULES[other].name != "__init__.py" and _floor(other) > _floor(name)}


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_each_other_in_one_direction_only(name: str) -> None:
    package = name.partition(".")[0]
    forbidden = {"adapterhub": {"train", "serve"}, "train": {"serve"}, "serve": {"train"}}[package]
    if name != "adapterhub" and not _is_in(name, "adapterhub.cli"):
        assert not forbidden & {other.partition(".")[0] for other in IMPORTS[name]}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for name, path in MODULES.items()
        if any(_is_in(imported, library) for imported in IMPORTS[name])
    }
    homes = LIBRARIES[library]
    strays = {user for user in users if not any(user == home or user.startswith(f"{home}/") for home in homes)}
    assert not strays
    assert all(any(user == home or user.startswith(f"{home}/") for user in users) for home in homes), "a home unused"


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.read_text()])
def test_every_module_says_what_it_owns(name: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text()))


def test_no_folder_holds_more_modules_than_one_can_read() -> None:
    counts = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_no_two_classes_share_a_name() -> None:
    """Except those that are the HTTP schema of another."""
    homes: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        if not (name.endswith(".schemas") or ".schemas." in name):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    homes.setdefault(node.name, []).append(name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_the_map_names_every_module() -> None:
    """docs/architecture.md draws each package as a tree, one line for a room or a few modules."""
    drawn: set[str] = set()
    stack: list[tuple[int, str]] = []
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        found = re.match(r"( +)(\w+)/(?:\s|$)", line)
        depth = len(line) - len(line.lstrip())
        if not line.startswith("    ") or (depth == 4 and not found):
            stack = []  # outside the trees
            continue
        while stack and stack[-1][0] >= depth:
            stack.pop()
        if found and (stack or found[2] in PACKAGES):
            stack.append((depth, f"{stack[-1][1] if stack else ''}{found[2]}."))
        if stack:
            names, *_ = re.split(r"\s{4,}", line[depth:] if not found else line[found.end() :].strip())
            drawn.update(stack[-1][1] + module for module in re.findall(r"(\w+)\.py", names))
    modules = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    assert drawn == modules


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


def test_config_scheduler_and_cache_load_no_torch() -> None:
    light = "serve.config, serve.local_engine.scheduler, serve.adapters.cache"
    code = f"import sys, {light}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
