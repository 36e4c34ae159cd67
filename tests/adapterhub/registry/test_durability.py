"""What the registry acknowledged survives a power cut: the order of its operations, and each state they may leave."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_operations import Recording, recorded
from hub_fixtures import ALICE, PEOPLE, start_hub
from packages import write_package

from adapterhub.adapter import Adapter
from adapterhub.hub.client import Hub
from adapterhub.package.layout import open_adapter
from adapterhub.package.signing import make_key, sign
from adapterhub.registry.registry import Registry


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("packages")
    return [open_adapter(write_package(folder / str(seed), name="captain", seed=seed)) for seed in range(2)]


def _check(recording: Recording, after: Path, *, draws: int = 1) -> None:
    """Check the order; then, for each power cut, that the store opens and that acknowledged names resolve.

    An acknowledgement is `NAME DIGEST`. The name may also point where it points next: a move may be on disk before it
    is acknowledged.
    """
    recording.check_order()
    told = [operation.what.split() for operation in recording.operations if operation.kind == "acknowledge"]
    for acknowledged, found in recording.crashes(after, draws=draws):
        registry = Registry(found / "home")
        pointed = dict(text.split() for text in acknowledged)
        upcoming = told[len(acknowledged) :]
        for name, digest in pointed.items():
            moved = next((to for called, to in upcoming if called == name), digest)
            if digest != "nothing":
                assert registry.resolve(name).digest in (digest, moved)
        for digest in registry.store.digests():
            assert registry.store.open(digest).digest == digest  # nothing half-made is seen
        assert {entry.digest for entry in registry.list()} <= set(registry.store.digests())


def test_add_and_promote(adapters: list[Adapter], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "disk" / "home")
    with recorded(tmp_path / "disk") as recording:
        for adapter in adapters:
            recording.acknowledge(f"captain@main {registry.add(adapter).digest}")
            recording.acknowledge(f"captain@production {registry.promote('captain', 'production').after}")
        recording.acknowledge(f"captain@production {registry.rollback('captain', 'production').after}")
    _check(recording, tmp_path / "after")


def test_a_log_that_a_killed_process_made(adapters: list[Adapter], tmp_path: Path) -> None:
    """It may have died between the file and the flush of its folder."""
    registry = Registry(tmp_path / "disk" / "home")
    registry.add(adapters[0], name="other")
    with recorded(tmp_path / "disk") as recording:
        (tmp_path / "disk" / "home" / "names" / "captain.jsonl").touch()
        recording.acknowledge(f"captain@main {registry.add(adapters[0]).digest}")
    _check(recording, tmp_path / "after")


def test_a_file_system_without_hard_links(
    adapters: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    registry = Registry(tmp_path / "disk" / "home")
    with recorded(tmp_path / "disk") as recording, monkeypatch.context() as patched:
        patched.setattr(os, "link", no_link)
        recording.acknowledge(f"captain@main {registry.add(adapters[0]).digest}")
    _check(recording, tmp_path / "after")


def test_an_add_flushes_each_new_file_once_and_no_shared_one(adapters: list[Adapter], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "disk" / "home")
    registry.add(adapters[0])
    with recorded(tmp_path / "disk") as recording:
        registry.add(adapters[1])
    flushed = [operation.what for operation in recording.operations if operation.kind == "fsync"]
    new = [what for what in flushed if what.startswith("home/objects/")]
    assert len(new) == 3  # weights, manifest and card; template and config are shared
    assert len(flushed) == len(new) + 4  # objects/, the package, adapters/ and the log


def test_a_package_that_gets_its_signature_later(adapters: list[Adapter], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "disk" / "home")
    registry.add(adapters[0])
    folder = write_package(tmp_path / "signed", name="captain")
    sign(open_adapter(folder), make_key(tmp_path / "key")[0])
    with recorded(tmp_path / "disk") as recording:
        recording.acknowledge(f"signed {registry.add(open_adapter(folder), name='signed').digest}")
    _check(recording, tmp_path / "after")


def test_a_damaged_package_that_is_replaced(adapters: list[Adapter], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "disk" / "home")
    damaged = registry.add(adapters[0]).path / "chat_template.jinja"
    damaged.chmod(0o644)
    damaged.write_text("damaged")
    with recorded(tmp_path / "disk") as recording:
        registry.add(adapters[0])
        recording.acknowledge(f"captain {adapters[0].digest}")
    recording.check_order()
    for acknowledged, found in recording.crashes(tmp_path / "after", draws=1):
        if acknowledged:
            assert Registry(found / "home").resolve("captain").digest == adapters[0].digest


def test_removal_and_gc(adapters: list[Adapter], tmp_path: Path) -> None:
    """A deleted package may come back whole, and never without its files."""
    registry = Registry(tmp_path / "disk" / "home")
    registry.add(adapters[0], name="held")
    registry.add(adapters[1], name="gone")
    with recorded(tmp_path / "disk") as recording:
        recording.acknowledge(f"held {adapters[0].digest}")
        registry.remove("gone")
        recording.acknowledge("gone nothing")
        assert registry.gc(grace_s=0).packages == (adapters[1].digest,)
    _check(recording, tmp_path / "after")


def test_a_probe_that_passed(adapters: list[Adapter], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "disk" / "home")
    adapter = registry.add(adapters[0])
    with recorded(tmp_path / "disk") as recording:
        registry.record_probe(adapter)
        recording.acknowledge("passed")
    recording.check_order()
    for acknowledged, found in recording.crashes(tmp_path / "after"):
        assert Registry(found / "home").probe_passed(adapter) or not acknowledged


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        yield url


def test_pull(url: str, adapters: list[Adapter], tmp_path: Path) -> None:
    hub = Hub(url, ALICE)
    hub.push(adapters[0], "alice/captain")
    registry = Registry(tmp_path / "disk" / "home")
    with recorded(tmp_path / "disk") as recording:
        recording.acknowledge(f"alice/captain {registry.pull('alice/captain', hub).digest}")
    _check(recording, tmp_path / "after", draws=0)
