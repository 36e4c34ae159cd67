"""Push and pull with the real client against our own Hub server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_fixtures import ALICE, BOB, PEOPLE, READER, start_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from packages import write_manifest, write_package
from road import run

from adapterhub.adapter import AdapterRef
from adapterhub.errors import (
    AdapterNotFound,
    Conflict,
    DigestMismatch,
    HubUnavailable,
    NotAuthorized,
    SignatureInvalid,
    UnsafeFile,
    UsageError,
)
from adapterhub.hub.client import PUBLIC_ENDPOINT, Hub
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.commit import NewCommit, PutFile, RepoFile
from adapterhub.hubserver.storage.store import HubStore
from adapterhub.package.layout import open_adapter
from adapterhub.package.signing import make_key, sign
from adapterhub.registry.registry import Registry

OURS = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        yield url


@pytest.fixture
def hub(url: str) -> Hub:
    return Hub(url, ALICE)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package", name="captain")


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    return f"alice/{abs(hash(request.node.nodeid)):x}"


def test_what_is_pulled_is_what_was_pushed(hub: Hub, package: Path, repo: str, tmp_path: Path) -> None:
    pushed = open_adapter(package)
    commit = hub.push(pushed, repo)
    pulled, found = hub.pull(repo, tmp_path / "pulled")
    assert (pulled.digest, found) == (pushed.digest, commit)
    assert sorted(p.name for p in pulled.path.iterdir()) == sorted(p.name for p in package.iterdir())


def test_a_pull_at_a_revision_gets_that_one(hub: Hub, package: Path, repo: str, tmp_path: Path) -> None:
    first = hub.push(open_adapter(package), repo)
    newer = open_adapter(write_package(tmp_path / "newer", seed=1))
    hub.push(newer, repo)
    assert hub.pull(repo, tmp_path / "a", revision=first)[0].digest == open_adapter(package).digest
    assert hub.pull(repo, tmp_path / "b")[0].digest == newer.digest


def test_pushing_the_same_again_makes_no_commit(hub: Hub, package: Path, repo: str) -> None:
    adapter = open_adapter(package)
    assert hub.push(adapter, repo) == hub.push(adapter, repo)


def test_a_push_is_one_commit(hub: Hub, package: Path, repo: str) -> None:
    hub.push(open_adapter(package), repo)
    commits = HfApi(endpoint=hub.endpoint, token=ALICE).list_repo_commits(repo)
    assert len(commits) == 2  # the empty one a repository starts with, and ours


def test_the_registry_keeps_a_pulled_adapter_by_name_and_commit(
    hub: Hub, package: Path, repo: str, tmp_path: Path
) -> None:
    commit = hub.push(open_adapter(package), repo)
    registry = Registry(tmp_path / "home", hub)
    pulled = registry.resolve(AdapterRef.parse(repo))
    offline = Registry(tmp_path / "home")
    assert offline.resolve(AdapterRef.parse(repo)).digest == pulled.digest
    assert offline.resolve(AdapterRef.parse(f"{repo}@{commit}")).digest == pulled.digest
    assert [entry.revision for entry in offline.list()] == ["main"]
    assert not list((tmp_path / "home").glob(".pull-*"))


def test_a_search_by_base_finds_only_its_adapters(hub: Hub, tmp_path: Path, repo: str) -> None:
    hub.push(open_adapter(write_package(tmp_path / "a", base_id="owner/special")), repo)
    assert [found.name for found in hub.search(base="owner/special")] == [repo]
    assert hub.search(base="owner/nobody") == []


def test_a_missing_repository_is_not_found(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="alice/nothing"):
        hub.pull("alice/nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_missing_revision_is_another_error_than_a_missing_repository(
    hub: Hub, package: Path, repo: str, tmp_path: Path
) -> None:
    hub.push(open_adapter(package), repo)
    with pytest.raises(AdapterNotFound, match="that revision does not"):
        hub.pull(repo, tmp_path / "x", revision="v9")


@pytest.mark.parametrize(
    "token", ["hf_wrong", READER, BOB, None], ids=["unknown", "read-only", "another user's", "none"]
)
def test_a_token_that_may_not_push_is_refused(url: str, package: Path, token: str | None) -> None:
    with pytest.raises(NotAuthorized, match="HF_TOKEN") as caught:
        Hub(url, token).push(open_adapter(package), "alice/forbidden")
    assert str(token) not in str(caught.value)


def test_a_private_adapter_is_not_shown_to_others(url: str, hub: Hub, package: Path, repo: str, tmp_path: Path) -> None:
    hub.push(open_adapter(package), repo, private=True)
    with pytest.raises(AdapterNotFound, match="may be private"):
        Hub(url, BOB).pull(repo, tmp_path / "x")


def test_an_unreachable_hub_can_be_tried_later(tmp_path: Path) -> None:
    with pytest.raises(HubUnavailable, match="not answering") as caught:
        Hub("http://127.0.0.1:9", None).pull("a/b", tmp_path / "x")
    assert caught.value.exit_code == 75


def test_a_push_that_was_overtaken_is_a_conflict(
    hub: Hub, package: Path, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_adapter(package)
    hub.push(adapter, repo)
    client = HfApi(endpoint=hub.endpoint, token=ALICE)
    old = client.model_info(repo)
    client.create_commit(repo, [CommitOperationAdd("README.md", b"# changed")], commit_message="other")
    newer = open_adapter(write_package(package.parent / "newer", seed=3))
    monkeypatch.setattr(
        type(hub._api), "model_info", lambda self, repo, revision: old
    )  # what we saw before the other's push
    with pytest.raises(Conflict, match="changed meanwhile"):
        hub.push(newer, repo)


def test_a_base_that_is_a_local_folder_is_refused_at_push(hub: Hub, tmp_path: Path) -> None:
    adapter = open_adapter(write_package(tmp_path / "p", base_id="/home/me/base"))
    with pytest.raises(UsageError, match="local folder"):
        hub.push(adapter, "alice/local-base")


def test_a_repository_with_a_pickle_is_refused_before_a_download(
    hub: Hub, package: Path, repo: str, tmp_path: Path
) -> None:
    hub.push(open_adapter(package), repo)
    client = HfApi(endpoint=hub.endpoint, token=ALICE)
    client.create_commit(repo, [CommitOperationAdd("adapter_model.bin", b"\x80\x04.")], commit_message="bad")
    with pytest.raises(UnsafeFile, match=r"adapter_model\.bin"):
        hub.pull(repo, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_tampered_repository_is_refused_and_nothing_stays(hub: Hub, package: Path, repo: str, tmp_path: Path) -> None:
    hub.push(open_adapter(package), repo)
    client = HfApi(endpoint=hub.endpoint, token=ALICE)
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 999, "target_modules": ["q_proj"]}).encode()
    client.create_commit(repo, [CommitOperationAdd("adapter_config.json", config)], commit_message="bad")
    with pytest.raises(DigestMismatch, match=r"adapter_config\.json"):
        hub.pull(repo, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_repository_that_is_no_package_says_how_to_adopt_it(
    hub: Hub, package: Path, repo: str, tmp_path: Path
) -> None:
    hub.push(open_adapter(package), repo)
    client = HfApi(endpoint=hub.endpoint, token=ALICE)
    client.create_commit(repo, [CommitOperationDelete("adapterhub.json")], commit_message="plain PEFT")
    with pytest.raises(AdapterNotFound, match="adapterhub pack"):
        hub.pull(repo, tmp_path / "x")


@pytest.mark.parametrize(
    ("environment", "asked", "token"),
    [
        ({}, None, "hf_stored"),
        ({}, OURS, None),
        ({"HF_ENDPOINT": OURS}, None, None),
        ({"HF_ENDPOINT": OURS}, PUBLIC_ENDPOINT, None),
        ({"HF_TOKEN": "hf_given"}, None, "hf_given"),
        ({"HF_TOKEN": "hf_given"}, PUBLIC_ENDPOINT + "/", "hf_given"),
        ({"HF_TOKEN": "hf_given"}, OURS, None),
        ({"HF_TOKEN": "hf_given", "HF_ENDPOINT": OURS + "/"}, None, "hf_given"),
        ({"HF_TOKEN": "hf_given", "HF_ENDPOINT": OURS}, OURS + "/", "hf_given"),
        ({"HF_TOKEN": "hf_given", "HF_ENDPOINT": OURS}, PUBLIC_ENDPOINT, None),
        ({"HF_TOKEN": "hf_given", "HF_ENDPOINT": OURS}, OURS + "0", None),
    ],
)
def test_a_token_is_sent_only_to_the_endpoint_it_was_given_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], asked: str | None, token: str | None
) -> None:
    stored = tmp_path / "token"
    stored.write_text("hf_stored")
    monkeypatch.setenv("HF_TOKEN_PATH", str(stored))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(stored))
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Hub.from_environment(asked).token == token


def test_a_missing_token_says_for_which_hub_there_is_one(
    url: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", ALICE)
    monkeypatch.setenv("HF_ENDPOINT", OURS)
    with pytest.raises(NotAuthorized, match=f"HF_TOKEN is for {OURS}; set HF_ENDPOINT={url}"):
        Hub.from_environment(url).push(open_adapter(package), "alice/nobodys")


def test_a_second_push_leaves_only_its_own_files(hub: Hub, repo: str, tmp_path: Path) -> None:
    first, second = write_package(tmp_path / "first"), write_package(tmp_path / "second", seed=1)
    (first / "tokenizer.json").write_text("{}")
    write_manifest(first)
    hub.push(open_adapter(first), repo)
    hub.push(open_adapter(second), repo)
    pulled, _ = hub.pull(repo, tmp_path / "pulled")
    assert pulled.digest == open_adapter(second).digest
    assert sorted(path.name for path in pulled.path.iterdir()) == sorted(path.name for path in second.iterdir())


def test_a_merged_proposal_leaves_only_its_own_files(hub: Hub, repo: str, tmp_path: Path) -> None:
    first, second = write_package(tmp_path / "first"), write_package(tmp_path / "second", seed=1)
    (first / "tokenizer.json").write_text("{}")
    write_manifest(first)
    hub.push(open_adapter(first), repo)
    number = int(hub.propose(open_adapter(second), repo).rpartition("/")[2])
    HfApi(endpoint=hub.endpoint, token=ALICE).merge_pull_request(repo, number)
    assert hub.pull(repo, tmp_path / "pulled")[0].digest == open_adapter(second).digest


def test_a_push_of_an_unsigned_version_takes_the_old_signature_away(hub: Hub, repo: str, tmp_path: Path) -> None:
    signed = open_adapter(write_package(tmp_path / "signed"))
    sign(signed, make_key(tmp_path / "key")[0])
    hub.push(signed, repo)
    hub.push(open_adapter(write_package(tmp_path / "unsigned", seed=1)), repo)
    assert not (hub.pull(repo, tmp_path / "pulled")[0].path / "adapter.sig").exists()


@pytest.mark.parametrize("act", ["push", "propose"])
def test_a_signature_of_another_package_is_refused_at_push(hub: Hub, repo: str, tmp_path: Path, act: str) -> None:
    signed, other = (open_adapter(write_package(tmp_path / f"p{seed}", seed=seed)) for seed in range(2))
    hub.push(other, repo)
    commit = hub.commit_of(repo)
    sign(signed, make_key(tmp_path / "key")[0])
    shutil.copy(signed.path / "adapter.sig", other.path)
    with pytest.raises(SignatureInvalid, match="not what was signed"):
        getattr(hub, act)(other, repo)
    assert hub.commit_of(repo) == commit


def test_a_list_has_every_adapter_and_the_hub_does_the_search(tmp_path: Path) -> None:
    store = HubStore(tmp_path)
    card = b"---\ntags: [adapterhub]\n---\n"
    names = [f"alice/many-{number}" for number in range(103)]
    for name in [*names, "alice/wanted"]:
        store.create_repo(RepoId.parse(name), author="alice")
        change = PutFile("README.md", RepoFile(blob=store.objects.put_blob(card), size=len(card)))
        store.commit(RepoId.parse(name), "main", changes=[change], new=NewCommit("alice", "card"))
    with start_hub(tmp_path, PEOPLE) as url:
        hub = Hub(url)
        assert {one.name for one in hub.search()} == {*names, "alice/wanted"}
        assert [one.name for one in hub.search(text="WANT")] == ["alice/wanted"]
        assert len(hub.search(limit=2)) == 2
        done = run("search", "want", "--hub", url, "--json", home=tmp_path / "home")
        assert [row["name"] for row in json.loads(done.stdout)] == ["alice/wanted"]
