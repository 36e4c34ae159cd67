"""Push and pull with the real client against our own Hub server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_fixtures import ALICE, BOB, PEOPLE, READER, start_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from packages import write_package

from adapterhub.adapter import AdapterRef
from adapterhub.errors import (
    AdapterNotFound,
    Conflict,
    DigestMismatch,
    HubUnavailable,
    NotAuthorized,
    UnsafeFile,
    UsageError,
)
from adapterhub.hub.client import Hub
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry


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
    monkeypatch.setattr(type(hub._api), "model_info", lambda self, repo: old)  # what we saw before the other's push
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


def test_another_endpoint_is_not_sent_the_public_hubs_stored_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = tmp_path / "token"
    stored.write_text("hf_secret")
    monkeypatch.setenv("HF_TOKEN_PATH", str(stored))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert Hub.from_environment("http://127.0.0.1:9").token is None
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    assert Hub.from_environment("http://127.0.0.1:9/") == Hub("http://127.0.0.1:9", "hf_given")
