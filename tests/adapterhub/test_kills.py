"""kill -9 at random moments: nothing complete is lost, nothing half-done is seen, and the next run finishes.

A few kills of each act, or for as long as ADAPTERHUB_SOAK_S says (seconds, of each; `make soak`).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_fixtures import ALICE, PEOPLE, start_hub
from packages import write_package

from adapterhub.adapter import Adapter, AdapterRef, StoredBase
from adapterhub.errors import InvalidManifest
from adapterhub.hub.client import Hub
from adapterhub.package.layout import open_adapter
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry

KILLS = 4


def kills(at_least: int = KILLS) -> Iterator[int]:
    """0, 1, ... as often as one is to be killed."""
    until = time.monotonic() + float(os.environ.get("ADAPTERHUB_SOAK_S", "0"))
    number = 0
    while number < at_least or time.monotonic() < until:
        yield number
        number += 1
    print(f"{number} kills")


_START = """
import sys, os
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
from pathlib import Path
from adapterhub.adapter import AdapterRef
from adapterhub.hub.client import Hub
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry
"""


def _killed(code: str, *arguments: object, random_s: random.Random, longest_s: float) -> list[str]:
    """Run `code` until it says that it begins, and kill it a random time after. Return what it acknowledged."""
    command = [sys.executable, "-c", _START + code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "begins\n"
        time.sleep(random_s.uniform(0, longest_s))
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().split("\n")[:-1]
    assert process.wait() == -signal.SIGKILL, "it ended by itself"
    return told


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    seed = int(os.environ.get("ADAPTERHUB_SEED", time.time_ns() % 1_000_000))
    print(f"ADAPTERHUB_SEED={seed}")  # shown when the test fails
    return random.Random(seed)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two, each with 2 MB more than small ones have, so that copying takes a moment."""
    from packages import write_manifest

    made = []
    for seed in range(2):
        folder = write_package(tmp_path_factory.mktemp("packages") / str(seed), name="captain", seed=seed)
        (folder / "tokenizer.json").write_bytes(random.Random(seed).randbytes(2_000_000))
        write_manifest(folder, name="captain")
        made.append(folder)
    return made


def _is_whole(registry: Registry, digests: set[str]) -> None:
    """All that can be seen is complete, and one of those put in."""
    for digest in registry.store.digests():
        assert registry.store.open(digest).digest in digests
    for entry in registry.list():
        assert registry.resolve(AdapterRef(name=entry.name, revision=entry.revision)).digest == entry.digest


def _holds_what_it_acknowledged(registry: Registry, told: list[str]) -> None:
    """Each line of `told` is `NAME DIGEST`; the moves of a name are acknowledged in their order."""
    pointed: dict[str, list[str]] = {}
    for line in told:
        name, digest = line.split()
        pointed.setdefault(name, []).append(digest)
    for text, digests in pointed.items():
        name, _, revision = text.partition("@")
        moves = [str(move.after) for move in registry.history(name) if move.revision == revision]
        assert moves[-len(digests) :] == digests or moves[-len(digests) - 1 : -1] == digests
        if moves[-1] != "None":
            assert registry.resolve(text).digest == moves[-1]


def _is_tidy(registry: Registry) -> None:
    """After a collection, nothing temporary is left."""
    old = time.time() - 3600
    for path in (*registry.root.glob("*/.*.tmp"), *registry.root.glob(".pull-*")):
        os.utime(path, (old, old))
    registry.gc()
    assert not [*registry.root.glob("*/.*.tmp"), *registry.root.glob(".pull-*")]


_ADD_AND_GC = """
registry = Registry(Path(sys.argv[1]))
adapters = [open_adapter(Path(path)) for path in sys.argv[2:]]
print("begins", flush=True)
while True:
    for adapter in adapters:
        print("captain@main", registry.add(adapter).digest, flush=True)
        print("captain@production", registry.promote("captain", "production").after, flush=True)
        registry.gc(grace_s=0)
        registry.remove("captain")
        print("captain@main", None, flush=True)
        registry.gc(grace_s=0)
"""


def test_add_promote_remove_and_gc(packages: list[Path], chance: random.Random, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "home")
    adapters = [open_adapter(package) for package in packages]
    held = registry.add(adapters[0], name="held").digest
    for number in kills():
        told = _killed(_ADD_AND_GC, registry.root, *packages, random_s=chance, longest_s=0.15)
        _holds_what_it_acknowledged(registry, told)
        assert list(registry.verify_all()) == []
        _is_whole(registry, {adapter.digest for adapter in adapters})
        assert registry.resolve(AdapterRef.parse("held")).digest == held  # nothing complete is lost
        assert registry.add(adapters[number % 2]).digest == adapters[number % 2].digest
    moves = [move for move in registry.history("captain") if move.revision == "production"]
    assert all(later.before == earlier.after for earlier, later in itertools.pairwise(moves))
    _is_tidy(registry)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        yield url


_PUSH = """
hub = Hub(sys.argv[1], sys.argv[2])
adapters = [open_adapter(Path(path)) for path in sys.argv[4:]]
print("begins", flush=True)
while True:
    for adapter in adapters:
        hub.push(adapter, sys.argv[3])
"""


def test_push(url: str, packages: list[Path], chance: random.Random, tmp_path: Path) -> None:
    hub = Hub(url, ALICE)
    adapters = [open_adapter(package) for package in packages]
    hub.push(adapters[0], "alice/killed")
    for number in kills():
        _killed(_PUSH, url, ALICE, "alice/killed", *packages, random_s=chance, longest_s=0.6)
        pulled, _ = hub.pull("alice/killed", tmp_path / f"x{number}")
        assert pulled.digest in {adapter.digest for adapter in adapters}
        hub.push(adapters[number % 2], "alice/killed")
        assert hub.pull("alice/killed", tmp_path / f"y{number}")[0].digest == adapters[number % 2].digest


_PULL = """
hub = Hub(sys.argv[1], sys.argv[2])
registry = Registry(Path(sys.argv[3]))
print("begins", flush=True)
while True:
    for revision in sys.argv[4:]:
        kept = registry.pull(AdapterRef(name="alice/pulled", revision=revision), hub)
        print(f"alice/pulled@{revision}", kept.digest, flush=True)
        registry.remove("alice/pulled", revision)
        print(f"alice/pulled@{revision}", None, flush=True)
        registry.gc(grace_s=0)
"""


def test_pull(url: str, packages: list[Path], chance: random.Random, tmp_path: Path) -> None:
    hub = Hub(url, ALICE)
    adapters = [open_adapter(package) for package in packages]
    commits = [hub.push(adapter, "alice/pulled") for adapter in adapters]
    registry = Registry(tmp_path / "home")
    held = registry.add(adapters[0], name="held").digest
    for number in kills():
        told = _killed(_PULL, url, ALICE, registry.root, *commits, random_s=chance, longest_s=0.8)
        _holds_what_it_acknowledged(registry, told)
        _is_whole(registry, {adapter.digest for adapter in adapters})
        assert registry.resolve(AdapterRef.parse("held")).digest == held
        wanted = AdapterRef(name="alice/pulled", revision=commits[number % 2])
        assert registry.pull(wanted, hub).digest == adapters[number % 2].digest
    _is_tidy(registry)


_PACK = """
from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases import loading
from adapterhub.packer import pack
base = StoredBase(Path(sys.argv[2]), BaseRef("tests/tiny-llama", None, sys.argv[3]), "apache-2.0")
loaded = loading.load_base(base, purpose="serve", dtype="float32")
loading.load_base = lambda *args, **options: loaded  # once: what is killed is the packing
print("begins", flush=True)
number = 0
while True:
    number += 1
    pack(Path(sys.argv[1]), base=base, name=f"name-{number}")
"""


def test_pack(tiny_base: StoredBase, peft_folder: Path, chance: random.Random, tmp_path: Path) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    digests: set[str] = set()
    for _ in kills(2):  # each loads a base
        arguments = (folder, tiny_base.path, tiny_base.ref.fingerprint)
        _killed(_PACK, *arguments, random_s=chance, longest_s=1.5)
        found = _opened(folder)  # no package yet, or a whole one
        digests |= {found.digest} if found else set()
    digests.add(pack(folder, base=tiny_base).digest)
    assert len(digests) == 1
    assert not list(folder.glob(".*.tmp"))


def _opened(folder: Path) -> Adapter | None:
    try:
        return open_adapter(folder)
    except InvalidManifest as error:
        assert "has no adapterhub.json" in str(error)
        return None
