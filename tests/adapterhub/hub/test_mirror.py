"""Mirror a history between two of our own Hub servers: rewritten, broken, private and gated ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_fixtures import ALICE, PEOPLE, start_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from packages import write_package

from adapterhub.adapter import Adapter
from adapterhub.errors import Conflict
from adapterhub.hub.client import Hub, RepoAccess
from adapterhub.hub.mirror import mirror
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.store import HubStore
from adapterhub.package.layout import open_adapter


@pytest.fixture(scope="module")
def source_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def source(source_root: Path) -> Iterator[Hub]:
    with start_hub(source_root, PEOPLE) as url:
        yield Hub(url, ALICE)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with start_hub(tmp_path_factory.mktemp("target"), PEOPLE) as url:
        yield Hub(url, ALICE)


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    return f"alice/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("versions")
    return [open_adapter(write_package(folder / str(seed), seed=seed)) for seed in range(3)]


def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def digest_at(hub: Hub, repo: str, folder: Path) -> str:
    return hub.pull(repo, folder)[0].digest


def test_a_squashed_history_does_not_roll_the_copy_back(
    source: Hub, target: Hub, repo: str, versions: list[Adapter], tmp_path: Path
) -> None:
    source.push(versions[0], repo)
    for _ in range(2):
        api(source).super_squash_history(repo)
        mirror(repo, source, target)
    source.push(versions[1], repo)
    for _ in range(2):
        mirror(repo, source, target)
    assert digest_at(target, repo, tmp_path / "there") == versions[1].digest


def test_a_commit_that_changes_nothing_there_is_marked_and_not_fetched_again(
    source: Hub, target: Hub, repo: str, versions: list[Adapter]
) -> None:
    source.push(versions[0], repo)
    assert len(mirror(repo, source, target)) == 1
    api(source).super_squash_history(repo)
    said: list[str] = []
    assert mirror(repo, source, target, report=said.append) == []
    assert "changes nothing there" in said[0]
    assert list(target.tags(repo)) == [f"mirrored-{source.commit_of(repo)}"]
    assert mirror(repo, source, target, report=said.append) == []
    assert len(said) == 1


def test_a_source_that_went_back_takes_the_copy_back(
    source: Hub, source_root: Path, target: Hub, repo: str, versions: list[Adapter], tmp_path: Path
) -> None:
    first = source.push(versions[0], repo)
    source.push(versions[1], repo)
    assert len(mirror(repo, source, target)) == 2
    store = HubStore(source_root)
    there = store.repo(RepoId.parse(repo))
    store.save(there.model_copy(update={"branches": {"main": first}}))
    assert [len(mirror(repo, source, target)) for _ in range(2)] == [1, 0]
    assert digest_at(target, repo, tmp_path / "there") == versions[0].digest
    source.push(versions[2], repo)
    assert [len(mirror(repo, source, target)) for _ in range(2)] == [1, 0]
    assert digest_at(target, repo, tmp_path / "again") == versions[2].digest


def test_a_commit_that_is_no_package_is_left_out_and_named(
    source: Hub, target: Hub, repo: str, versions: list[Adapter], tmp_path: Path
) -> None:
    source.push(versions[0], repo)
    client = api(source)
    client.create_commit(repo, [CommitOperationAdd("notes.txt", b"x")], commit_message="notes")
    client.create_commit(
        repo,
        [CommitOperationDelete("notes.txt"), CommitOperationAdd("adapter_config.json", b"{}")],
        commit_message="bad",
    )
    source.push(versions[1], repo)
    said: list[str] = []
    assert len(mirror(repo, source, target, report=said.append)) == 2
    left_out = [line for line in said if "no package, left out" in line]
    assert [line.split(":")[0].split(" ", 1)[1] for line in left_out] == ["initial commit", "notes", "bad"]
    assert "notes.txt" in left_out[1]
    assert digest_at(target, repo, tmp_path / "there") == versions[1].digest
    assert mirror(repo, source, target) == []


@pytest.mark.parametrize(
    "access",
    [
        RepoAccess(private=True, gated=None),
        RepoAccess(private=False, gated="manual"),
        RepoAccess(private=False, gated="auto"),
    ],
)
def test_a_copy_is_as_private_and_gated_as_the_original(
    source: Hub, target: Hub, repo: str, versions: list[Adapter], tmp_path: Path, access: RepoAccess
) -> None:
    source.push(versions[0], repo)
    settings = {"private": True} if access.private else {"gated": access.gated}
    # Settings from the start, or set after the first copy was made: the copy follows.
    for name, before in ((f"{repo}-new", False), (f"{repo}-old", True)):
        if before:
            api(source).update_repo_settings(repo, private=False, gated=False)
            mirror(repo, source, target, name=name)
            assert target.access(name) == RepoAccess(private=False, gated=None)
        api(source).update_repo_settings(repo, **settings)
        mirror(repo, source, target, name=name)
        assert target.access(name) == access
        with pytest.raises((RepositoryNotFoundError, GatedRepoError)):
            HfApi(endpoint=target.endpoint, token=False).auth_check(name)


def test_a_copy_that_was_closed_there_stays_closed(
    source: Hub, target: Hub, repo: str, versions: list[Adapter]
) -> None:
    source.push(versions[0], repo)
    mirror(repo, source, target)
    api(target).update_repo_settings(repo, private=True)
    source.push(versions[1], repo)
    assert len(mirror(repo, source, target)) == 1
    assert target.access(repo).private


@pytest.mark.parametrize("at", [1, 2], ids=["before the first commit", "after it"])
def test_a_push_to_the_copy_meanwhile_is_not_overwritten(
    source: Hub, target: Hub, repo: str, versions: list[Adapter], tmp_path: Path, at: int
) -> None:
    for adapter in (versions[0], versions[1], versions[0]):
        source.push(adapter, repo)
    assert len(mirror(repo, source, target)) == 3
    api(source).create_commit(repo, [CommitOperationAdd("notes.txt", b"x")], commit_message="notes")
    api(source).create_commit(repo, [CommitOperationDelete("notes.txt")], commit_message="no notes")
    source.push(versions[1], repo)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == at:
            target.push(versions[2], repo)

    with pytest.raises(Conflict, match="changed meanwhile"):
        mirror(repo, source, target, report=report)
    assert digest_at(target, repo, tmp_path / "there") == versions[2].digest


def test_a_copy_with_commits_of_its_own_is_refused(
    source: Hub, target: Hub, repo: str, versions: list[Adapter]
) -> None:
    source.push(versions[0], repo)
    target.push(versions[1], repo)
    with pytest.raises(Conflict, match="is not a mirror of"):
        mirror(repo, source, target)
