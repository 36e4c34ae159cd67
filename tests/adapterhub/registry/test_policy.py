"""Every act that moves a name passes the trust policy: through the command, and through a server's routes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from api_bench import bench
from httpx import ASGITransport
from packages import write_package
from typer.testing import CliRunner

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.cli.main import app
from adapterhub.errors import AdapterHubError, AliasProtected, Conflict, ProbeMismatch, SignatureInvalid, UsageError
from adapterhub.feedback.promotion import Promotion
from adapterhub.hub.client import Hub
from adapterhub.package.bundle import write_bundle
from adapterhub.package.layout import open_adapter
from adapterhub.package.signing import make_key, sign
from adapterhub.registry.name_log import Act
from adapterhub.registry.policy import Policy
from adapterhub.registry.registry import Registry
from serve.api.app import create_app
from serve.api.auth import ApiKeys
from serve.training.runs import TrainingRun, TrainingRuns

POLICY = 'protected = ["production"]\n[[trust]]\nnames = "acme/*"\nkeys = ["ada.pub"]\n'
TRUSTED, FREE = "acme/captain", "free/captain"
UNSIGNED, SIGNED = 51, 52
"""Seeds of the two packages that a name is moved to."""
KINDS = {"unsigned": UNSIGNED, "signed": SIGNED}


class Shop:
    """A registry whose names all point to a signed adapter, and the policy that was written afterwards."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.registry, self.folder = Registry(home), folder
        private, public = make_key(folder / "keys" / "ada")
        self.packages: dict[int, Adapter] = {}
        for seed in (UNSIGNED, SIGNED, 50):
            package = open_adapter(write_package(folder / f"package-{seed}", name="captain", seed=seed))
            if seed != UNSIGNED:
                sign(package, private)
            self.packages[seed] = open_adapter(package.path)
        self.private = private
        for name in (TRUSTED, FREE):
            for seed in (UNSIGNED, SIGNED, 50):
                self.registry.add(self.packages[seed], name=name)
            # A rollback of each alias would point it to the package that it is named after.
            for alias, seed in (("was-unsigned", UNSIGNED), ("was-signed", SIGNED)):
                self.registry.promote(AdapterRef.parse(f"{name}@{self.packages[seed].digest}"), alias)
                self.registry.promote(AdapterRef.parse(f"{name}@main"), alias)
        shutil.copyfile(public, home / "ada.pub")
        (home / "policy.toml").write_text(POLICY)

    def targets(self) -> dict[str, str | None]:
        """Where every revision of every name points to."""
        logs = self.registry.log.all()
        return {f"{log.name}@{revision}": move.after for log in logs for revision, move in log.revisions().items()}


@pytest.fixture
def shop(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = Shop(home, tmp_path)

    def pull(hub: Hub, name: str, folder: Path, *, revision: str | None = None) -> tuple[Adapter, str]:
        """A Hub whose revision `v51` is the package of seed 51; any other one is the signed package."""
        seed = int(revision[1:]) if revision in ("v51", "v52") else SIGNED
        shutil.copytree(made.packages[seed].path, folder)
        return open_adapter(folder), "c" * 40

    monkeypatch.setattr(Hub, "pull", pull)
    return made


Words = Callable[[Shop, str, int], list[str]]


def _bundle(shop: Shop, seed: int) -> Path:
    path = shop.folder / f"bundle-{seed}.zip"
    write_bundle(shop.packages[seed], path)
    return path


COMMANDS: dict[str, Words] = {
    "add": lambda shop, name, seed: ["add", str(shop.packages[seed].path), "--name", name],
    "import": lambda shop, name, seed: ["import", str(_bundle(shop, seed)), "--name", name],
    "pull": lambda shop, name, seed: ["pull", f"{name}@v{seed}"],
    "promote": lambda shop, name, seed: ["promote", f"{name}@{shop.packages[seed].digest}", "stable"],
    "rollback": lambda shop, name, seed: [
        "rollback", name, "was-signed" if seed == SIGNED else "was-unsigned",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [TRUSTED, FREE])
@pytest.mark.parametrize("act", COMMANDS)
def test_command_that_moves_a_name(shop: Shop, act: str, name: str, kind: str) -> None:
    before, seed = shop.targets(), KINDS[kind]
    done = CliRunner().invoke(app, COMMANDS[act](shop, name, seed))
    if name == TRUSTED and kind == "unsigned":
        assert isinstance(done.exception, SignatureInvalid)
        assert TRUSTED in str(done.exception)
        assert shop.targets() == before
    else:
        assert done.exit_code == 0, done.exception
        moved = {revision for revision, target in shop.targets().items() if target != before.get(revision)}
        assert [shop.targets()[revision] for revision in moved] == [shop.packages[seed].digest]


def test_command_improve_does_not_train_what_could_not_be_promoted(shop: Shop) -> None:
    before = shop.targets()
    done = CliRunner().invoke(app, ["improve", TRUSTED, "--promote"])
    assert isinstance(done.exception, SignatureInvalid)
    assert "a new candidate is unsigned" in str(done.exception)
    assert shop.targets() == before


def test_command_improve_does_not_train_for_a_name_that_points_elsewhere(shop: Shop) -> None:
    done = CliRunner().invoke(app, ["improve", f"{FREE}@{shop.packages[SIGNED].digest}", "--promote"])
    assert isinstance(done.exception, Conflict)
    assert f"{FREE} points to {shop.packages[50].digest[:19]}" in str(done.exception)


@pytest.mark.parametrize(("seed", "error"), [(UNSIGNED, SignatureInvalid), (SIGNED, None)])
def test_candidate_of_an_improvement(shop: Shop, seed: int, error: type[Exception] | None) -> None:
    """The last step of `improve`: what was trained is refused, whatever was checked before the run."""
    before, candidate = shop.targets(), shop.packages[seed]
    promotion = Promotion(shop.registry, TRUSTED, shop.packages[50].digest)
    if error is None:
        promotion.move(candidate)
        assert shop.targets()[f"{TRUSTED}@main"] == candidate.digest
        return
    for step in (promotion.check, promotion.move):
        with pytest.raises(error, match=TRUSTED):
            step(candidate)
    assert shop.targets() == before


PROTECTED: dict[str, tuple[list[str], type[AdapterHubError]]] = {
    "pull": (["pull", f"{TRUSTED}@production"], AliasProtected),
    "remove": (["remove", f"{TRUSTED}@production"], AliasProtected),
    "promote unsigned": (["promote", f"{TRUSTED}@was-unsigned", "production"], SignatureInvalid),
    "promote untrusted": (["promote", f"{FREE}@main", "production"], SignatureInvalid),
    "rollback": (["rollback", TRUSTED, "production"], ProbeMismatch),
}


@pytest.mark.parametrize("act", PROTECTED)
def test_command_on_a_protected_alias(shop: Shop, act: str) -> None:
    (shop.registry.root / "policy.toml").unlink()
    for seed in (SIGNED, 50):
        shop.registry.promote(AdapterRef.parse(f"{TRUSTED}@{shop.packages[seed].digest}"), "production")
    shop.registry.rollback(TRUSTED, "was-unsigned")
    (shop.registry.root / "policy.toml").write_text(POLICY)
    before = shop.targets()
    words, error = PROTECTED[act]
    done = CliRunner().invoke(app, words)
    assert type(done.exception) is error
    assert shop.targets() == before


def test_protected_alias_that_a_probe_and_a_signature_let_pass(shop: Shop) -> None:
    newest = shop.registry.open(AdapterRef.parse(TRUSTED))
    shop.registry.record_probe(newest)
    done = CliRunner().invoke(app, ["promote", TRUSTED, "production"])
    assert done.exit_code == 0, done.exception
    assert shop.targets()[f"{TRUSTED}@production"] == newest.digest


def test_policy_behind_a_broken_link_lets_nothing_pass(shop: Shop) -> None:
    path = shop.registry.root / "policy.toml"
    path.rename(shop.folder / "moved.toml")
    path.symlink_to(shop.folder / "policy.toml")
    with pytest.raises(UsageError, match="nothing is trusted"):
        shop.registry.add(shop.packages[UNSIGNED], name=TRUSTED)


def test_probe_that_an_earlier_version_recorded_is_replayed_again(shop: Shop) -> None:
    """Its record does not say which probe passed."""
    newest = shop.registry.open(AdapterRef.parse(TRUSTED))
    record = shop.registry.root / "probes" / f"{newest.digest.removeprefix('sha256:')}.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text("{}")
    with pytest.raises(ProbeMismatch, match="has not passed here"):
        shop.registry.promote(AdapterRef.parse(TRUSTED), "production")
    replayed = shop.registry.promote(AdapterRef.parse(TRUSTED), "production", prove=lambda adapter: None)
    assert replayed.after == newest.digest


def test_policy_that_is_written_while_an_adapter_is_stored(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that counts is the one under the lock of the log."""
    (shop.registry.root / "policy.toml").unlink()
    before, read = shop.targets(), Policy.read
    asked: list[Path] = []

    def late(folder: Path) -> Policy:
        asked.append(folder)
        if len(asked) == 2:
            (folder / "policy.toml").write_text(POLICY)
        return read(folder)

    monkeypatch.setattr(Policy, "read", late)
    fresh = open_adapter(write_package(shop.folder / "fresh", name="captain", seed=60))
    with pytest.raises(SignatureInvalid):
        shop.registry.add(fresh, name=TRUSTED)
    assert shop.targets() == before


def test_refused_adapter_is_not_stored(shop: Shop) -> None:
    fresh = open_adapter(write_package(shop.folder / "fresh", name="captain", seed=60))
    with pytest.raises(SignatureInvalid):
        shop.registry.add(fresh, name=TRUSTED)
    assert not shop.registry.store.has(fresh.digest)


@pytest.mark.parametrize("act", ["add", "import", "pull", "remove"])
def test_act_that_never_moves_a_protected_alias(shop: Shop, act: Act) -> None:
    adapter = shop.registry.open(AdapterRef.parse(TRUSTED))
    with pytest.raises(AliasProtected, match=rf"{act} cannot move {TRUSTED}@production"):
        shop.registry.check_move(adapter, TRUSTED, "production", act=act)


def test_registry_is_the_only_place_that_writes_a_move() -> None:
    root = Path(__file__).parents[3]
    sources = {path: path.read_text() for package in ("adapterhub", "serve") for path in (root / package).rglob("*.py")}
    writers = {path.relative_to(root).as_posix() for path, text in sources.items() if "log.append(" in text}
    assert writers == {"adapterhub/registry/registry.py"}
    assert sources[root / "adapterhub/registry/registry.py"].count("log.append(") == 1


# A server's routes


class OneRun:
    """A run that improved acme/captain and made the package of a seed."""

    def __init__(self, shop: Shop, seed: int) -> None:
        self.folder = shop.folder / "training"
        made = shutil.copytree(shop.packages[seed].path, self.folder / "run-1")
        recipe = f'name = "acme/captain"\nstart = "{shop.packages[50].digest}"\n'
        self._run = TrainingRun("run-1", 1, "done", recipe, (), (), (), None, TRUSTED, made, "")

    def get(self, name: str) -> TrainingRun:
        return self._run

    async def pack(self, name: str, **_: object) -> None:
        pass


@asynccontextmanager
async def _server(shop: Shop, seed: int) -> AsyncIterator[httpx.AsyncClient]:
    async with bench(shop.folder / "server") as b:
        registry = Registry(shop.registry.root, Hub("http://hub.invalid"))
        b.services.catalog._registry = registry
        training = cast("TrainingRuns", OneRun(shop, seed))
        services = replace(b.services, registry=registry, training=training)
        transport = ASGITransport(create_app(services, ApiKeys()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield client


Asked = Callable[[Shop, int], tuple[str, dict[str, Any]]]
ZIP = {"content-type": "application/zip"}


def _json(path: str, **body: str) -> tuple[str, dict[str, Any]]:
    return path, {"json": body}


ROUTES: dict[str, Asked] = {
    "upload": lambda shop, seed: (
        "/v1/adapters/upload",
        {"content": _bundle(shop, seed).read_bytes(), "headers": ZIP, "params": {"name": "acme/new"}},
    ),
    "pull": lambda shop, seed: _json("/v1/adapters/pull", ref=f"{TRUSTED}@v{seed}"),
    "promote": lambda shop, seed: _json(
        "/v1/adapters/promote", ref=f"{TRUSTED}@{shop.packages[seed].digest}", alias="stable"
    ),
    "rollback": lambda shop, seed: _json(
        "/v1/adapters/rollback", name=TRUSTED, alias="was-signed" if seed == SIGNED else "was-unsigned"
    ),
    "publish a candidate": lambda shop, seed: _json("/v1/training/runs/run-1/publish"),
    "promote a candidate": lambda shop, seed: _json("/v1/training/runs/run-1/promote"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ROUTES)
def test_route_that_moves_a_trusted_name(shop: Shop, act: str, kind: str) -> None:
    seed = KINDS[kind]
    if act == "publish a candidate":  # it is published as NAME-SUFFIX, and NAME is the manifest's
        (shop.registry.root / "policy.toml").write_text(POLICY.replace("acme/*", "*captain*"))
    before = shop.targets()

    async def ask() -> httpx.Response:
        async with _server(shop, seed) as client:
            path, given = ROUTES[act](shop, seed)
            return await client.post(path, **given)

    answer = asyncio.run(ask())
    moved = {revision: target for revision, target in shop.targets().items() if target != before.get(revision)}
    if kind == "unsigned":
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_signature_invalid")
        assert moved == {}
    else:
        assert answer.is_success, answer.text
        assert list(moved.values()) == [shop.packages[seed].digest]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("pull", {"ref": f"{TRUSTED}@production"}, 403, "alias_protected"),
        ("promote", {"ref": TRUSTED, "alias": "production"}, 422, "adapter_probe_mismatch"),
        ("promote", {"ref": FREE, "alias": "production"}, 422, "adapter_signature_invalid"),
    ],
)
def test_route_on_a_protected_alias(shop: Shop, path: str, body: dict[str, str], status: int, code: str) -> None:
    before = shop.targets()

    async def ask() -> httpx.Response:
        async with _server(shop, SIGNED) as client:
            return await client.post(f"/v1/adapters/{path}", json=body)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert shop.targets() == before
