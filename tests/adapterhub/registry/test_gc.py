"""Garbage collection: what nothing refers to is deleted, and nothing that is leased."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from packages import write_package
from road import run

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import AdapterNotFound, DigestMismatch
from adapterhub.package.layout import open_adapter
from adapterhub.package.run_record import LOG_NAME
from adapterhub.registry.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home")


@pytest.fixture
def adapters(registry: Registry, tmp_path: Path) -> list[Adapter]:
    """Three that were `captain` one after the other: the first can be reached by its digest alone."""
    packages = [write_package(tmp_path / f"p{seed}", name="captain", seed=seed) for seed in range(3)]
    return [registry.add(open_adapter(package)) for package in packages]


def _kept(registry: Registry, adapters: list[Adapter]) -> list[bool]:
    return [registry.store.has(adapter.digest) for adapter in adapters]


def test_what_no_name_points_to_is_deleted_with_its_files(registry: Registry, adapters: list[Adapter]) -> None:
    removed = registry.gc(grace_s=0)
    assert removed.packages == (adapters[0].digest,)
    assert removed.num_bytes > 0
    assert _kept(registry, adapters) == [False, True, True]  # the second is where a rollback of main would point
    linked = {path.stat().st_ino for path in (registry.root / "adapters").glob("*/*")}
    assert {path.stat().st_ino for path in (registry.root / "objects").iterdir()} == linked
    assert registry.gc(grace_s=0).packages == ()


def test_what_a_stopped_run_started_from_stays_until_it_is_complete(
    registry: Registry, adapters: list[Adapter]
) -> None:
    folder = registry.root / "training"
    folder.mkdir()
    (folder / "run-1.toml").write_text(f'start = "{adapters[0].digest}"')
    (folder / "run-2.toml").write_text("torn =")
    assert registry.gc(grace_s=0).packages == ()
    (folder / "run-1").mkdir()
    (folder / "run-1" / LOG_NAME).touch()
    assert registry.gc(grace_s=0).packages == (adapters[0].digest,)


def test_within_the_grace_period_nothing_goes(registry: Registry, adapters: list[Adapter]) -> None:
    assert registry.gc(grace_s=60).packages == ()
    old = time.time() - 120
    for adapter in adapters:
        os.utime(adapter.path, (old, old))
    # An old package, but its last name left it a moment ago.
    assert registry.gc(grace_s=60).packages == ()


def test_a_clock_that_was_wrong_holds_longer_and_never_shorter(registry: Registry, adapters: list[Adapter]) -> None:
    """Moves and packages dated tomorrow; then the clock is put right."""
    path = registry.root / "names" / "captain.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["at"] = "2999-01-01T00:00:00Z"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tomorrow = time.time() + 86_400
    for adapter in adapters:
        os.utime(adapter.path, (tomorrow, tomorrow))
    assert registry.gc(grace_s=60).packages == ()
    assert registry.promote(AdapterRef.parse("captain"), "production").after == adapters[2].digest
    assert registry.history("captain")[-1].revision == "production"  # the order of lines, whatever the clocks said


def test_a_dry_run_lists_and_deletes_nothing(registry: Registry, adapters: list[Adapter]) -> None:
    told = registry.gc(grace_s=0, dry_run=True)
    assert told.packages == (adapters[0].digest,)
    assert _kept(registry, adapters) == [True, True, True]


def test_what_an_alias_points_to_or_would_roll_back_to_stays(registry: Registry, adapters: list[Adapter]) -> None:
    for adapter in adapters[:2]:
        registry.promote(AdapterRef.parse(f"captain@{adapter.digest}"), "production")
    assert registry.gc(grace_s=0).packages == ()
    assert registry.rollback("captain", "production").after == adapters[0].digest


def test_a_leased_package_stays_until_the_lease_ends(registry: Registry, adapters: list[Adapter]) -> None:
    with registry.lease(adapters[0]):
        assert registry.gc(grace_s=0).packages == ()
    assert registry.gc(grace_s=0).packages == (adapters[0].digest,)
    with pytest.raises(AdapterNotFound, match="no longer in"), registry.lease(adapters[0]):
        pass


def test_a_lease_of_another_process_counts_and_ends_when_it_is_killed(
    registry: Registry, adapters: list[Adapter]
) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom adapterhub.registry.registry import Registry\n"
        "with Registry(Path(sys.argv[1])).store.lease(sys.argv[2]):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    arguments = [sys.executable, "-c", code, str(registry.root), adapters[0].digest]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert registry.gc(grace_s=0).packages == ()
        process.kill()
    assert registry.gc(grace_s=0).packages == (adapters[0].digest,)


def test_a_folder_of_somebody_elses_needs_no_lease(registry: Registry, tmp_path: Path) -> None:
    with registry.lease(open_adapter(write_package(tmp_path / "p"))):
        pass


def test_what_a_killed_process_left_half_done_goes_and_what_is_in_work_stays(
    registry: Registry, adapters: list[Adapter]
) -> None:
    from adapterhub.files import hold

    left, working = (registry.root / "adapters" / f".{name}.0.tmp" for name in ("left", "working"))
    pulling, half = registry.root / ".pull-x", registry.root / "objects" / ".half.0.tmp"
    for folder in (left, working, pulling):
        folder.mkdir()
    half.touch()
    old = time.time() - 3600
    for path in (left, working, pulling, half):
        os.utime(path, (old, old))
    with hold(working):
        registry.gc()
    assert [path.exists() for path in (left, working, pulling, half)] == [False, True, False, False]


def test_a_package_damaged_on_disk_is_mended_by_adding_it_again(
    registry: Registry, adapters: list[Adapter], tmp_path: Path
) -> None:
    weights = adapters[2].path / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    registry.add(open_adapter(tmp_path / "p2"))
    assert registry.resolve(AdapterRef.parse("captain")).digest == adapters[2].digest


def test_a_file_that_changes_between_verifying_and_copying_is_not_kept(registry: Registry, tmp_path: Path) -> None:
    adapter = open_adapter(write_package(tmp_path / "p"))
    (adapter.path / "chat_template.jinja").write_text("{{ massages }}")
    with pytest.raises(DigestMismatch, match="changed while it was copied"):
        registry.add(adapter)
    assert registry.list() == []
    assert not [*registry.root.glob("adapters/[!.]*")]


def test_adding_during_gc_loses_nothing_that_was_added(registry: Registry, tmp_path: Path) -> None:
    packages = [open_adapter(write_package(tmp_path / str(n), name="x", seed=n)) for n in range(4)]
    stop = threading.Event()

    def run_gc() -> None:
        while not stop.is_set():
            registry.gc(grace_s=0)

    thread = threading.Thread(target=run_gc)
    thread.start()
    try:
        for round_ in range(40):
            digest = registry.add(packages[round_ % 4], name="x").digest
            assert registry.resolve(AdapterRef.parse("x")).digest == digest
    finally:
        stop.set()
        thread.join()


def test_the_verb(home: Path, tmp_path: Path) -> None:
    first = run("add", str(write_package(tmp_path / "a", name="captain")), home=home).stdout.strip()
    run("remove", "captain", home=home)
    assert run("gc", home=home).stdout == ""
    assert run("gc", "--grace", "0", "--dry-run", home=home).stdout.strip() == first
    assert run("gc", "--grace", "0", home=home).stdout.strip() == first
    assert not list((home / "objects").iterdir())
