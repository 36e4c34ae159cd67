"""Garbage collection: it deletes what nothing refers to, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_fixtures import REPO, age, objects, upload
from typer.testing import CliRunner

from adapterhub.cli.main import app
from adapterhub.hubserver.garbage_collection import GarbageCollector
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.commit import DeleteFile, NewCommit, PutFile
from adapterhub.hubserver.storage.discussion_store import DiscussionStore
from adapterhub.hubserver.storage.history import remove_objects, squash
from adapterhub.hubserver.storage.store import HubStore


@pytest.fixture
def store(tmp_path: Path) -> HubStore:
    store = HubStore(tmp_path)
    store.create_repo(REPO, author="alice")
    return store


def put_lfs(store: HubStore, path: str, data: bytes) -> PutFile:
    return PutFile(path, store.lfs_entry(REPO, upload(store, data)))


def commit(store: HubStore, *changes: PutFile | DeleteFile, branch: str = "main") -> str:
    return store.commit(REPO, branch, changes=changes, new=NewCommit("alice", "a change")).sha


def test_what_a_ref_reaches_stays(store: HubStore, tmp_path: Path) -> None:
    commit(store, put_lfs(store, "w", b"before"))
    first = commit(store, put_lfs(store, "w", b"after"))
    store.create_branch(REPO, "try", start=first)
    commit(store, put_lfs(store, "w", b"branch"), branch="try")
    store.create_tag(REPO, "v1", target="try")
    store.delete_branch(REPO, "try")
    pull = DiscussionStore(store).open(
        REPO,
        author="bob",
        title="t",
        description="",
        is_pull=True,
        first=([put_lfs(store, "w", b"pull")], NewCommit("bob", "t")),
    )
    age(tmp_path)
    deleted = GarbageCollector(tmp_path).gc()
    assert (deleted.num_objects, deleted.num_commits) == (0, 0)
    assert objects(tmp_path) == {b"before", b"after", b"branch", b"pull"}
    assert store.commit_at(store.repo(REPO), f"refs/pr/{pull.num}").files["w"].size == 4


def test_what_nothing_reaches_goes(store: HubStore, tmp_path: Path) -> None:
    upload(store, b"never committed")
    commit(store, put_lfs(store, "w", b"squashed away"))
    commit(store, put_lfs(store, "w", b"kept"), PutFile("a", store.lfs_entry(REPO, upload(store, b"twice"))))
    squash(store, REPO, "main", author="alice", message="one")
    store.objects.put_blob(b"never committed, small")
    left = store.objects.begin_upload("0" * 64, size_bytes=1)
    left.close()
    age(tmp_path)
    deleted = GarbageCollector(tmp_path).gc()
    assert (deleted.num_objects, deleted.num_commits) == (3, 3)
    assert deleted.freed_bytes == len(b"never committed" + b"squashed away" + b"never committed, small")
    assert objects(tmp_path) == {b"kept", b"twice"}
    assert GarbageCollector(tmp_path).gc().num_objects == 0


def test_young_uploads_stay(store: HubStore, tmp_path: Path) -> None:
    fresh, reused = upload(store, b"fresh"), upload(store, b"reused")
    age(tmp_path)
    upload(store, b"fresh")
    # The client asked, heard that it is here, and has not committed yet.
    assert store.has_lfs(REPO, reused)
    store.objects.put_blob(b"blob")
    assert GarbageCollector(tmp_path).gc().num_objects == 0
    assert store.lfs_entry(REPO, fresh).size == 5
    assert objects(tmp_path) == {b"fresh", b"reused", b"blob"}
    commit(store, PutFile("w", store.lfs_entry(REPO, reused)))


def test_deleted_repository_frees_what_no_other_holds(store: HubStore, tmp_path: Path) -> None:
    commit(store, put_lfs(store, "w", b"shared"), put_lfs(store, "x", b"alone"))
    other = RepoId.parse("datasets/bob/copy")
    store.create_repo(other, author="bob")
    entry = store.lfs_entry(other, upload(store, b"shared", other))
    store.commit(other, "main", changes=[PutFile("w", entry)], new=NewCommit("bob", "w"))
    store.delete_repo(REPO)
    age(tmp_path)
    GarbageCollector(tmp_path).gc()
    assert objects(tmp_path) == {b"shared"}


def test_ancestors_of_a_young_commit_stay(store: HubStore, tmp_path: Path) -> None:
    store.create_branch(REPO, "try", start="main")
    commit(store, put_lfs(store, "w", b"old"), branch="try")
    age(tmp_path)
    young = commit(store, PutFile("a", store.lfs_entry(REPO, upload(store, b"young"))), branch="try")
    store.delete_branch(REPO, "try")
    assert GarbageCollector(tmp_path).gc().num_commits == 0
    store.create_branch(REPO, "again", start=young)
    history = list(store.history(store.repo(REPO), "again"))
    assert [one.title for one in history] == ["a change", "a change", "initial commit"]
    remove_objects(store, REPO, [str(history[0].files["w"].sha256)], is_rewriting=True)
    assert list(store.commit_at(store.repo(REPO), "again").files) == ["a"]
    store.delete_branch(REPO, "again")
    age(tmp_path)
    assert GarbageCollector(tmp_path).gc().num_commits == 4


def test_incomplete_repositories_and_trash_go_when_they_are_old(store: HubStore, tmp_path: Path) -> None:
    left = [store.folder(RepoId.parse(name)) for name in ("bob/copy", "datasets/bob/copy")]
    for folder in (*left, tmp_path / "trash" / "half-made"):
        (folder / "commits").mkdir(parents=True)
    GarbageCollector(tmp_path).gc()
    assert all(folder.is_dir() for folder in (*left, tmp_path / "trash" / "half-made"))
    age(tmp_path)
    GarbageCollector(tmp_path).gc()
    assert not any(folder.exists() for folder in left)
    assert list((tmp_path / "trash").iterdir()) == []
    assert store.repo(REPO)


def test_gc_command_says_what_it_removed(store: HubStore, tmp_path: Path) -> None:
    upload(store, bytes(2_000_000))
    age(tmp_path)
    done = CliRunner().invoke(app, ["hub", "gc", "--root", str(tmp_path)])
    assert done.output == "deleted 1 objects and 0 commits, 2.0 MB\n"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], {b"young"}),
        (["--grace", "4"], {b"old", b"young"}),
        (["--grace", "2"], {b"young"}),
        # The old option keeps its unit.
        (["--grace-hours", "96"], {b"old", b"young"}),
        (["--grace-hours", "48"], {b"young"}),
    ],
)
def test_grace_is_in_days(store: HubStore, tmp_path: Path, options: list[str], left: set[bytes]) -> None:
    upload(store, b"old")
    age(tmp_path)
    upload(store, b"young")
    done = CliRunner().invoke(app, ["hub", "gc", "--root", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    assert objects(tmp_path) == left
    assert ("use --grace DAYS" in done.stderr) == ("--grace-hours" in options)


@pytest.mark.parametrize(
    "options", [["--grace", "0.2"], ["--grace-hours", "5"], ["--grace", "1", "--grace-hours", "24"]]
)
def test_grace_too_short_for_an_upload_or_given_twice_is_refused(
    store: HubStore, tmp_path: Path, options: list[str]
) -> None:
    upload(store, b"old")
    age(tmp_path)
    assert CliRunner().invoke(app, ["hub", "gc", "--root", str(tmp_path), *options]).exit_code != 0
    assert objects(tmp_path) == {b"old"}


def test_gc_of_another_folder_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["hub", "gc", "--root", str(tmp_path)])
    assert done.exit_code != 0
    assert list(tmp_path.iterdir()) == []
