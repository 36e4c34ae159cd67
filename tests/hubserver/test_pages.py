"""Commit records that share pages, the bounded caches, and folders of adapterhub 0.1."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from hub_fixtures import REPO, age, objects, start_hub
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.hubserver.errors import RevisionNotFound, TooLarge
from adapterhub.hubserver.garbage_collection import GarbageCollector
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage import commit as commits
from adapterhub.hubserver.storage.commit import DeleteFile, NewCommit, PutFile, RepoCommit, RepoFile
from adapterhub.hubserver.storage.discussion_store import DiscussionStore
from adapterhub.hubserver.storage.pages import PagedFiles, pages_of, parse_page, split_pages
from adapterhub.hubserver.storage.sized_cache import SizedCache
from adapterhub.hubserver.storage.store import HubStore

HUB_0_1 = Path(__file__).parents[1] / "fixtures" / "hub_0_1_0"
BLOB = "0" * 40


@pytest.fixture
def store(tmp_path: Path) -> HubStore:
    store = HubStore(tmp_path)
    store.create_repo(REPO, author="alice")
    return store


def many(count: int) -> dict[str, RepoFile]:
    return {f"data/part-{number:06}.json": RepoFile(blob=BLOB, size=number) for number in range(count)}


def commit(store: HubStore, *changes: PutFile | DeleteFile) -> RepoCommit:
    made = store.commit(REPO, "main", changes=changes, new=NewCommit("alice", "a change"))
    return store.commit_at(store.repo(REPO), made.sha)


def written(store: HubStore) -> int:
    folder = store.folder(REPO)
    return sum(path.stat().st_size for part in ("commits", "pages") for path in (folder / part).iterdir())


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(0, 9), max_size=40), st.integers(0, 3000))
def test_pages_hold_exactly_the_files(sizes: dict[str, int], more: int) -> None:
    files = {path: RepoFile(blob=BLOB, size=size) for path, size in sizes.items()} | many(more)
    pages = dict(split_pages(files))
    by_id = {ref.id: parse_page(data) for ref, data in pages.items()}
    paged = PagedFiles(tuple(pages), len(files), by_id.__getitem__)
    assert list(paged) == sorted(files)
    assert dict(paged) == files
    for path in (*files, "", "zzz", "data/part-0"):
        assert paged.get(path) == files.get(path)
    assert max(map(len, by_id.values()), default=0) <= 1024


@pytest.mark.parametrize(
    "change",
    [
        PutFile("data/part-001500.json", RepoFile(blob="1" * 40, size=1)),
        DeleteFile("data/part-000700.json"),
        PutFile("data/part-000700x.json", RepoFile(blob=BLOB, size=1)),
    ],
)
def test_a_small_change_of_many_files_writes_one_page(store: HubStore, change: PutFile | DeleteFile) -> None:
    first = commit(store, *(PutFile(path, entry) for path, entry in many(5000).items()))
    before, whole = {page for page, _ in pages_of(first)}, written(store)
    second = commit(store, change)
    after = {page for page, _ in pages_of(second)}
    assert len(after - before) <= 1
    assert written(store) - whole < whole / 10


def test_history_reads_no_pages(store: HubStore) -> None:
    commit(store, *(PutFile(path, entry) for path, entry in many(600).items()))
    shutil.rmtree(store.folder(REPO) / "pages")
    fresh = HubStore(store.objects.git_folder.parents[1])
    repo = fresh.repo(REPO)
    assert [one.title for one in fresh.history(repo, "main")] == ["a change", "initial commit"]
    with pytest.raises(RevisionNotFound, match="deleted while it was read"):
        dict(fresh.commit_at(repo, "main").files)


def test_commits_count_for_the_quota(store: HubStore) -> None:
    before, stored = written(store), store.stored_bytes(store.repo(REPO))
    commit(store, *(PutFile(path, entry) for path, entry in many(600).items()))
    files = sum(entry.size for entry in many(600).values())
    assert store.stored_bytes(store.repo(REPO)) - stored == written(store) - before + files


def test_a_commit_of_too_many_files_is_refused(store: HubStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "MAX_FILES", 3)
    commit(store, *(PutFile(path, entry) for path, entry in many(3).items()))
    with pytest.raises(TooLarge, match="4 files: expected at most 3"):
        commit(store, PutFile("one-more", RepoFile(blob=BLOB, size=1)))


def test_gc_deletes_pages_that_no_commit_has(store: HubStore, tmp_path: Path) -> None:
    store.create_branch(REPO, "try", start="main")
    store.commit(
        REPO, "try", changes=[PutFile(path, entry) for path, entry in many(600).items()], new=NewCommit("alice", "x")
    )
    kept = commit(store, PutFile("a", RepoFile(blob=store.objects.put_blob(b"a"), size=1)))
    store.delete_branch(REPO, "try")
    age(tmp_path)
    assert GarbageCollector(tmp_path).gc().num_commits == 1
    assert [path.stem for path in (store.folder(REPO) / "pages").iterdir()] == [page for page, _ in pages_of(kept)]


def test_a_cache_is_bounded_by_bytes() -> None:
    cache = SizedCache[int](100)
    made: list[int] = []

    def value(number: int, size: int) -> int:
        return cache.get(number, lambda: (made.append(number) or number, size))

    chance = random.Random(1)
    for _ in range(500):
        number = chance.randrange(20)
        assert value(number, number * 3) == number
        assert cache.size_bytes <= 100
    assert value(99, 101) == 99
    assert cache.size_bytes == 0
    made.clear()
    assert [value(number, 30) for number in (1, 2, 3, 1, 4, 1, 2)] == [1, 2, 3, 1, 4, 1, 2]
    assert made == [1, 2, 3, 4, 2]


# A folder of adapterhub 0.1


@pytest.fixture
def old(tmp_path: Path) -> HubStore:
    """A copy of a folder that adapterhub 0.1.0 wrote: two repositories, a tag, a pull request, two LFS files."""
    shutil.copytree(HUB_0_1, tmp_path / "old")
    return HubStore(tmp_path / "old")


def test_a_folder_of_0_1_is_read_as_it_was(old: HubStore) -> None:
    repo = old.repo(REPO)
    history = list(old.history(repo, "main"))
    assert [one.title for one in history] == ["second", "first", "initial commit"]
    for one in history:
        # The id is git's, over everything that the record holds.
        again = RepoCommit.create(
            one.files, one.parents, author=one.author, title=one.title, description=one.description, time_s=one.time_s
        )
        assert again == one
    assert history[0].size_bytes == 8 + 4 + 12
    assert old.path_of(old.commit_at(repo, "v1").file("w.safetensors")).read_bytes() == b"weights one\n"
    assert old.repo(RepoId.parse("datasets/team/pairs")).private


def test_a_folder_of_0_1_is_written_on(old: HubStore) -> None:
    blob = old.objects.put_blob(b"new\n")
    old.commit(REPO, "main", changes=[PutFile("new.txt", RepoFile(blob=blob, size=4))], new=NewCommit("alice", "third"))
    DiscussionStore(old).merge(REPO, 1, author="alice")
    repo = old.repo(REPO)
    assert sorted(old.commit_at(repo, "main").files) == ["README.md", "new.txt", "w.safetensors"]
    assert len(list(old.history(repo, "main"))) == 5
    old.duplicate_repo(REPO, RepoId.parse("bob/copy"), private=False)
    copy = old.repo(RepoId.parse("bob/copy"))
    assert [one.sha for one in old.history(copy, "main")] == [one.sha for one in old.history(repo, "main")]


def test_gc_of_a_folder_of_0_1_keeps_what_is_reached(old: HubStore, tmp_path: Path) -> None:
    before = objects(tmp_path / "old")
    old.objects.put_blob(b"never committed")
    age(tmp_path / "old")
    deleted = GarbageCollector(tmp_path / "old").gc()
    assert (deleted.num_objects, deleted.num_commits) == (1, 0)
    assert objects(tmp_path / "old") == before


def test_a_folder_of_0_1_is_served(old: HubStore, tmp_path: Path) -> None:
    with start_hub(tmp_path / "old") as url:
        api = HfApi(endpoint=url, token=(tmp_path / "old" / "token").read_text())
        assert api.list_repo_files("alice/poems") == ["README.md", "logs/run 1/log.txt", "w.safetensors"]
        assert [one.num for one in api.get_repo_discussions("alice/poems")] == [1]
        got = api.hf_hub_download("alice/poems", "w.safetensors", revision="v1", cache_dir=tmp_path / "cache")
        assert Path(got).read_bytes() == b"weights one\n"
        assert len(api.list_repo_commits("team/pairs", repo_type="dataset")) == 2
