"""An adapter as a single file, a deployment as a lock file, and moves as they happen."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from packages import write_package
from road import COMMAND, run, run_any

from adapterhub.adapter import AdapterRef
from adapterhub.bundle import write_bundle
from adapterhub.errors import AdapterNotFound, InvalidManifest, SignatureInvalid, UsageError
from adapterhub.lock_file import read_lock
from adapterhub.package import open_adapter
from adapterhub.registry import Registry
from adapterhub.signing import make_key, sign


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home")


def _ref(text: str) -> AdapterRef:
    return AdapterRef.parse(text)


def test_a_bundle_carries_the_package_with_its_signature(registry: Registry, tmp_path: Path) -> None:
    private, public = make_key(tmp_path / "key")
    adapter = open_adapter(write_package(tmp_path / "p", name="captain"))
    sign(adapter, private)
    write_bundle(adapter, tmp_path / "captain.zip")
    registry.root.mkdir()
    (registry.root / "key.pub").write_bytes(public.read_bytes())
    (registry.root / "policy.toml").write_text('[[trust]]\nnames = "*"\nkeys = ["key.pub"]\n')
    assert registry.import_bundle(tmp_path / "captain.zip").digest == adapter.digest
    assert registry.resolve(_ref("captain")).digest == adapter.digest
    assert registry.history("captain")[0].act == "import"
    assert not list(registry.root.glob(".pull-*"))


def test_an_unsigned_bundle_is_refused_where_one_is_to_be_signed(registry: Registry, tmp_path: Path) -> None:
    write_bundle(open_adapter(write_package(tmp_path / "p", name="captain")), tmp_path / "captain.zip")
    registry.root.mkdir()
    (registry.root / "policy.toml").write_text('[[trust]]\nnames = "*"\nkeys = []\n')
    with pytest.raises(SignatureInvalid):
        registry.import_bundle(tmp_path / "captain.zip")
    assert registry.list() == []


def test_the_same_package_makes_the_same_bundle(tmp_path: Path) -> None:
    for name in "ab":
        write_bundle(open_adapter(write_package(tmp_path / name)), tmp_path / f"{name}.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_lock_leads_to_exactly_what_was_locked(registry: Registry, tmp_path: Path) -> None:
    first = registry.add(open_adapter(write_package(tmp_path / "a", name="captain")))
    lock = registry.lock({"captain": _ref("captain")})
    registry.add(open_adapter(write_package(tmp_path / "b", name="captain", seed=1)))
    assert registry.resolve(registry.obtain(lock.adapters["captain"], None)).digest == first.digest
    with pytest.raises(AdapterNotFound, match="bring it here first"):
        Registry(tmp_path / "elsewhere").obtain(lock.adapters["captain"], None)
    with pytest.raises(UsageError, match="no name"):
        registry.lock({"x": _ref(str(tmp_path / "a"))})


@pytest.mark.parametrize("text", ["", "{}", '{"adapters": {"x": {"name": "x", "digest": "sha256:1"}}}', '{"a": 1}'])
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.lock").write_text(text)
    with pytest.raises(InvalidManifest, match="lock file"):
        read_lock(tmp_path / "x.lock")


def test_a_watcher_sees_moves_as_they_happen(registry: Registry, tmp_path: Path) -> None:
    adapter = open_adapter(write_package(tmp_path / "a", name="captain"))
    registry.add(adapter)
    moves = registry.watch(["captain"], every_s=0.01)
    seen = []
    # The first look is taken when the generator starts, so it is started by asking for what is still to come.
    import threading

    thread = threading.Thread(target=lambda: seen.append(next(moves)))
    thread.start()
    while not seen:
        registry.promote(_ref("captain"), f"a{len(registry.history('captain'))}")
        thread.join(0.05)
    assert seen[0][0] == "captain"
    assert seen[0][1].act == "promote"


def test_the_verbs(home: Path, tmp_path: Path) -> None:
    package, bundle = write_package(tmp_path / "p", name="captain"), str(tmp_path / "c.zip")
    digest = run("add", str(package), home=home).stdout.strip()
    assert run("export", "captain", bundle, home=home).stdout.strip() == digest
    assert run("import", bundle, "--name", "crew/captain", home=home).stdout.strip() == digest
    lock = str(tmp_path / "adapterhub.lock")
    run("lock", "captain", "second=crew/captain", "--output", lock, home=home)
    assert json.loads(Path(lock).read_text())["adapters"]["second"]["digest"] == digest
    assert f"captain@{digest}" in run("pull", "--locked", lock, home=home).stdout
    assert run_any("pull", home=home).returncode == 2
    found = json.loads(run("search", "crew", "--base", "owner/base", "--json", home=home).stdout)
    assert [row["name"] for row in found] == ["crew/captain"]
    with subprocess.Popen(
        [COMMAND, "watch", "--every", "0.05"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.readline()
        number = 0
        line = ""
        import select

        while not line:
            run("promote", "captain", f"v{number}", home=home)
            number += 1
            if select.select([process.stdout], [], [], 0.5)[0]:
                line = process.stdout.readline()
        process.terminate()
    assert json.loads(line)["act"] == "promote"
