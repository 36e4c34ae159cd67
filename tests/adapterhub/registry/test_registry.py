from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packages import write_package

from adapterhub.adapter import AdapterRef
from adapterhub.errors import AdapterNotFound, DigestMismatch, InvalidManifest
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package", name="captain")


def _resolve(registry: Registry, text: str) -> str:
    return registry.resolve(AdapterRef.parse(text)).digest


def test_an_added_adapter_is_found_by_name_revision_and_digest(registry: Registry, package: Path) -> None:
    digest = registry.add(open_adapter(package)).digest
    assert _resolve(registry, "captain") == digest
    assert _resolve(registry, "captain@main") == digest
    assert _resolve(registry, digest) == digest


def test_it_stays_when_the_source_goes(registry: Registry, package: Path) -> None:
    registry.add(open_adapter(package))
    shutil.rmtree(package)
    assert _resolve(registry, "captain")


def test_a_folder_resolves_without_being_added(registry: Registry, package: Path) -> None:
    assert _resolve(registry, str(package)) == open_adapter(package).digest
    assert registry.list() == []


def test_equal_files_are_kept_once(registry: Registry, package: Path, tmp_path: Path) -> None:
    registry.add(open_adapter(package))
    before = len(list((registry.root / "objects").iterdir()))
    registry.add(open_adapter(write_package(tmp_path / "other", name="other", base_id="owner/other")))
    assert len(list((registry.root / "objects").iterdir())) == before + 2  # manifest and card


def test_kept_files_are_read_only(registry: Registry, package: Path) -> None:
    kept = registry.add(open_adapter(package))
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o222 for path in kept.path.iterdir())


def test_an_unknown_name_is_not_found_and_the_nearest_is_named(registry: Registry, package: Path) -> None:
    registry.add(open_adapter(package))
    with pytest.raises(AdapterNotFound, match=r"captian.*nearest: captain"):
        _resolve(registry, "captian")


def test_an_unknown_revision_lists_those_there_are(registry: Registry, package: Path) -> None:
    registry.add(open_adapter(package))
    with pytest.raises(AdapterNotFound, match="main"):
        _resolve(registry, "captain@v9")


def test_an_unknown_digest_is_not_found(registry: Registry) -> None:
    with pytest.raises(AdapterNotFound, match="sha256:00"):
        _resolve(registry, "sha256:" + "00" * 32)


def test_a_kept_file_changed_on_disk_is_noticed(registry: Registry, package: Path) -> None:
    kept = registry.add(open_adapter(package))
    weights = kept.path / "adapter_model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DigestMismatch):
        _resolve(registry, "captain")


def test_a_damaged_name_file_says_what_to_do(registry: Registry, package: Path) -> None:
    registry.add(open_adapter(package))
    next((registry.root / "names").glob("*.jsonl")).write_text("{\n")
    with pytest.raises(InvalidManifest, match="jsonl:1 is damaged.*delete it"):
        _resolve(registry, "captain")


def test_adding_again_moves_the_name_and_keeps_the_old_content(
    registry: Registry, package: Path, tmp_path: Path
) -> None:
    old = registry.add(open_adapter(package)).digest
    new = registry.add(open_adapter(write_package(tmp_path / "new", name="captain", seed=1))).digest
    assert _resolve(registry, "captain") == new != old
    assert _resolve(registry, old) == old


def test_the_list_shows_names_with_their_manifests(registry: Registry, package: Path, tmp_path: Path) -> None:
    registry.add(open_adapter(package), name="local/captain")
    registry.add(open_adapter(write_package(tmp_path / "b", name="b", seed=2)))
    assert [(e.name, e.revision, e.origin) for e in registry.list()] == [
        ("b", "main", "local"),
        ("local/captain", "main", "local"),
    ]


def test_many_at_once_lose_nothing(registry: Registry, tmp_path: Path) -> None:
    adapters = [open_adapter(write_package(tmp_path / str(n), seed=n)) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: registry.add(adapters[n % 8], name="same", revision=f"r{n}"), range(24)))
    assert len(registry.list()) == 24


def test_a_killed_add_leaves_nothing_visible_and_the_next_one_succeeds(registry: Registry, package: Path) -> None:
    code = (
        "import os, sys, adapterhub.registry.package_store as r\n"
        "from adapterhub.registry.registry import Registry\n"
        "from pathlib import Path\n"
        "from adapterhub.package.layout import open_adapter\n"
        "def die(*a): os.kill(os.getpid(), 9)\n"
        "r._link = die\n"
        "Registry(Path(sys.argv[1])).add(open_adapter(Path(sys.argv[2])))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(registry.root), str(package)], check=False, env=os.environ)
    assert done.returncode == -9
    assert registry.list() == []
    with pytest.raises(AdapterNotFound):
        _resolve(registry, "captain")
    registry.add(open_adapter(package))
    assert _resolve(registry, "captain")
