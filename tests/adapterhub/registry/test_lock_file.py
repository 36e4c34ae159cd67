"""An adapter as a single file, a deployment as a lock file, and moves as they happen."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hub_fixtures import ALICE, LFS_UPLOADS_WARN, PEOPLE, start_hub
from packages import write_manifest, write_package, write_peft_folder
from road import COMMAND, run, run_any
from typer.testing import CliRunner

from adapterhub.adapter import AdapterRef, StoredBase
from adapterhub.cli.main import app
from adapterhub.errors import (
    AdapterHubError,
    AdapterNotFound,
    DigestMismatch,
    HubUnavailable,
    InvalidManifest,
    PackageError,
    SignatureInvalid,
    UsageError,
)
from adapterhub.hub.client import Hub
from adapterhub.package.bundle import write_bundle
from adapterhub.package.layout import open_adapter
from adapterhub.package.signing import make_key, sign
from adapterhub.registry.lock_file import Lock, Locked, read_lock, write_lock
from adapterhub.registry.registry import Registry


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


def test_a_lock_resolves_to_exactly_what_was_locked(registry: Registry, tmp_path: Path) -> None:
    first = registry.add(open_adapter(write_package(tmp_path / "a", name="captain")))
    lock = registry.lock({"captain": _ref("captain")})
    registry.add(open_adapter(write_package(tmp_path / "b", name="captain", seed=1)))
    assert registry.resolve(registry.obtain(lock.adapters["captain"], None)).digest == first.digest
    with pytest.raises(AdapterNotFound, match="Add or import it first"):
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
    move = json.loads(line)
    assert move["act"] == "promote"
    assert move["about"]["license"] == move["about"]["licence"] == "apache-2.0"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        yield Hub(url, ALICE)


def test_a_locked_adapter_that_is_damaged_here_is_pulled_again(hub: Hub, registry: Registry, tmp_path: Path) -> None:
    hub.push(open_adapter(write_package(tmp_path / "p")), "alice/damaged")
    stored = registry.pull("alice/damaged", hub).path / "chat_template.jinja"
    locked = registry.lock({"one": _ref("alice/damaged")}).adapters["one"]
    stored.chmod(0o644)
    stored.write_text("damaged")
    assert registry.resolve(registry.obtain(locked, hub)).digest == locked.digest
    stored.chmod(0o644)
    stored.write_text("damaged")
    with pytest.raises(PackageError):  # without a Hub, the damage is named where it is used
        registry.resolve(registry.obtain(locked, None))


@LFS_UPLOADS_WARN
def test_a_locked_server_answers_with_what_was_locked_though_the_name_moved(
    hub: Hub, registry: Registry, tmp_path: Path, tiny_base: StoredBase
) -> None:
    """It moved on the Hub and on the machine that serves, which never had what is locked."""
    versions = []
    for seed in range(2):
        folder = write_peft_folder(tmp_path / f"{seed}", seed=seed, module="v_proj", layers_to_transform=[0])
        write_manifest(folder, name="captain", base_id="tests/tiny", fingerprint=str(tiny_base.ref.fingerprint))
        versions.append(open_adapter(folder))
    first, second = versions
    hub.push(first, "alice/captain")
    elsewhere = Registry(tmp_path / "elsewhere")
    elsewhere.pull(_ref("alice/captain"), hub)
    write_lock(tmp_path / "adapterhub.lock", elsewhere.lock({"captain": _ref("alice/captain")}))
    hub.push(second, "alice/captain")
    registry.pull(_ref("alice/captain"), hub)
    command = [COMMAND, "serve", "--base", str(tiny_base.path), "--locked", str(tmp_path / "adapterhub.lock")]
    options = ["--pin", "captain", "--port", "0", "--no-page", "--threads", "1"]
    env = {**os.environ, "ADAPTERHUB_HOME": str(registry.root)}
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=env) as server:
        assert server.stderr is not None
        try:
            url = next(found[1] for line in server.stderr if (found := re.match(r"ready: (\S+/v1)", line)))
            cards = httpx.get(f"{url}/models").json()["data"]
            body = {"prompt": "Hello", "max_tokens": 1}
            statuses = [
                httpx.post(f"{url}/completions", json={"model": name, **body}, timeout=30).status_code
                for name in ("captain", "alice/captain")
            ]
        finally:
            server.terminate()
            server.communicate()
    assert {card["id"]: card.get("digest") for card in cards} == {tiny_base.path.name: None, "captain": first.digest}
    assert statuses == [200, 404]
    assert registry.resolve(_ref("alice/captain")).digest == second.digest


@LFS_UPLOADS_WARN
@pytest.mark.parametrize(
    ("faults", "error", "said"),
    [
        ({"commit": None, "hub": None}, AdapterNotFound, "alice/other sha256:[0-9a-f]{64} is not .*Add or import it"),
        ({"commit": "0" * 40}, AdapterNotFound, "alice/other exists at .*, but that revision does not"),
        ({"name": "alice/nobody"}, AdapterNotFound, "shows no alice/nobody"),
        ({"digest": "sha256:" + "0" * 64}, DigestMismatch, "is sha256:[0-9a-f]{64}: expected sha256:000"),
        ({"hub": "http://127.0.0.1:1"}, HubUnavailable, "http://127.0.0.1:1 is not answering"),
    ],
)
def test_nothing_is_served_of_a_lock_whose_digest_is_not_to_be_had(
    hub: Hub, home: Path, tmp_path: Path, faults: dict[str, str | None], error: type[AdapterHubError], said: str
) -> None:
    _write_lock(hub, tmp_path, faults)
    with pytest.raises(error, match=said):
        _serve(tmp_path)


@LFS_UPLOADS_WARN
@pytest.mark.parametrize("options", [("--pin", "poet"), ("--weight", "poet=2")])
def test_nothing_is_served_when_an_option_names_what_the_lock_does_not(
    hub: Hub, home: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    _write_lock(hub, tmp_path, {})
    with pytest.raises(UsageError, match="unexpected name in --weight or --pin: poet"):
        _serve(tmp_path, *options)


def _write_lock(hub: Hub, folder: Path, faults: dict[str, str | None]) -> None:
    adapter = open_adapter(write_package(folder / "p", name="captain"))
    commit = hub.push(adapter, "alice/other")
    kept = Locked(name="alice/other", hub=hub.endpoint, commit=commit, digest=adapter.digest)
    write_lock(folder / "adapterhub.lock", Lock(adapters={"captain": kept.model_copy(update=faults)}))


def _serve(folder: Path, *options: str) -> None:
    """On a base that is not there, so that whatever goes wrong before it is looked for goes wrong first."""
    arguments = ["serve", "--base", str(folder / "no-base"), "--locked", str(folder / "adapterhub.lock"), *options]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
