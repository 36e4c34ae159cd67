"""The store on disk: git ids, safe names, verified objects, refs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.errors import StorageFull
from adapterhub.hubserver.errors import (
    AlreadyExists,
    EntryNotFound,
    HubServerError,
    InvalidName,
    RepoNotFound,
    RevisionNotFound,
    StaleParent,
    TooLarge,
    UploadMismatch,
)
from adapterhub.hubserver.garbage_collection import GarbageCollector
from adapterhub.hubserver.names import RepoId, check_path, check_ref
from adapterhub.hubserver.storage.commit import (
    DeleteFile,
    DeleteFolder,
    NewCommit,
    PutFile,
    RepoCommit,
    RepoFile,
    files_after,
)
from adapterhub.hubserver.storage.git_ids import blob_id, lfs_pointer, tree_ids
from adapterhub.hubserver.storage.history import squash
from adapterhub.hubserver.storage.store import HubStore

REPO = RepoId("alice", "poems")


@pytest.fixture
def store(tmp_path: Path) -> HubStore:
    return HubStore(tmp_path / "hub")


@pytest.fixture
def repo(store: HubStore) -> RepoId:
    store.create_repo(REPO, author="alice")
    return REPO


def put(store: HubStore, path: str, data: bytes = b"text") -> PutFile:
    return PutFile(path, RepoFile(blob=store.objects.put_blob(data), size=len(data)))


def commit(store: HubStore, *changes: PutFile | DeleteFile | DeleteFolder, parent: str | None = None) -> RepoCommit:
    return store.commit(REPO, "main", changes=changes, new=NewCommit("alice", "a change", parent=parent))


def upload(store: HubStore, data: bytes, sha256: str, *, size_bytes: int) -> None:
    with closing(store.objects.begin_upload(sha256, size_bytes=size_bytes)) as incoming:
        incoming.write(data)
        incoming.finish()


def git(folder: Path, *arguments: str) -> str:
    identity = {"NAME": "alice", "EMAIL": "alice@localhost", "DATE": "@1700000000 +0000"}
    env = {f"GIT_{who}_{key}": value for who in ("AUTHOR", "COMMITTER") for key, value in identity.items()}
    env |= {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(["git", *arguments], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with the git program")
def test_ids_are_gits_own(tmp_path: Path) -> None:
    big = b"weights" * 1000
    pointer = lfs_pointer(hashlib.sha256(big).hexdigest(), len(big))
    # Git sorts a folder as if its name ended in '/': after 'a-b' and 'a.b', before 'ab'.
    contents = {
        "a/b": b"1",
        "a-b": b"2",
        "a.b": b"",
        "ab": b"\x00\xff",
        "a/c/d/é.txt": b"3",
        "big.safetensors": pointer,
    }
    for path, data in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    tree = git(tmp_path, "write-tree")
    parent = git(tmp_path, "commit-tree", tree, "-m", "first")
    expected = git(tmp_path, "commit-tree", tree, "-p", parent, "-m", "títle", "-m", "and more")

    files = {path: RepoFile(blob=blob_id(data), size=len(data)) for path, data in contents.items()}
    ours = RepoCommit.create(
        files, (parent,), author="alice", title="títle", description="and more", time_s=1_700_000_000
    )
    assert tree_ids({path: entry.blob for path, entry in files.items()})[""] == tree
    assert ours.folders()["a/c/d"] == git(tmp_path, "rev-parse", f"{tree}:a/c/d")
    assert ours.sha == expected


def test_a_repository_without_files_has_gits_empty_tree(store: HubStore, repo: RepoId) -> None:
    assert store.commit_at(store.repo(repo), "main").folders() == {"": "4b825dc642cb6eb9a060e54bf8d69288fbee4904"}


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../up",
        "a/../b",
        "a/./b",
        "a//b",
        "a/",
        ".git/config",
        "a/.GIT/hooks",
        "a\\b",
        "a\nb",
        "a\x00b",
        "a\u202eb",
        "\ud800",
        "x" * 256,
        "/".join(["x" * 200] * 6),
    ],
)
def test_unsafe_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidName) as refusal:
        check_path(path)
    assert "invalid path" in str(refusal.value)


@pytest.mark.parametrize("path", ["a", ".gitattributes", "a b/c.d", "模型/é.txt", "...x"])
def test_ordinary_path_is_taken(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize("name", ["", "x", "a/", "/a", "../a", "a/..", "a/b/c", "a/b--c", "a/b.git", "api/b", "é/b"])
def test_unusable_repository_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidName) as refusal:
        RepoId.parse(name)
    assert "invalid" in str(refusal.value)


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a..b", "-a", "a b", "a~1", "a.lock", "refs/heads/a", "0" * 40])
def test_unusable_ref_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidName) as refusal:
        check_ref(name)
    assert "invalid branch or tag name" in str(refusal.value)


def test_changes_are_made_in_order(store: HubStore, repo: RepoId) -> None:
    first = commit(store, put(store, "a/x"), put(store, "a/y"), put(store, "b"))
    files = files_after(first, [DeleteFolder("a/"), put(store, "a/z"), DeleteFile("b")])
    assert list(files) == ["a/z"]


@pytest.mark.parametrize("change", [DeleteFile("a"), DeleteFile("gone"), DeleteFolder("b"), DeleteFolder("gone/")])
def test_deleting_what_is_not_there_is_refused(
    store: HubStore, repo: RepoId, change: DeleteFile | DeleteFolder
) -> None:
    head = commit(store, put(store, "a/x"), put(store, "b"))
    with pytest.raises(EntryNotFound) as refusal:
        commit(store, change)
    assert "doesn't exist" in str(refusal.value)
    assert refusal.value.headers == {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": head.sha}


def test_file_below_a_file_is_refused(store: HubStore, repo: RepoId) -> None:
    commit(store, put(store, "a"))
    with pytest.raises(InvalidName) as refusal:
        commit(store, put(store, "a/b/c"))
    assert "'a' is a file" in str(refusal.value)


def test_stale_parent_is_refused_and_changes_nothing(store: HubStore, repo: RepoId) -> None:
    start = store.repo(repo).branches["main"]
    head = commit(store, put(store, "a"), parent=start[:7])
    with pytest.raises(StaleParent) as refusal:
        commit(store, put(store, "b"), parent=start)
    assert head.sha in str(refusal.value)
    assert store.repo(repo).branches["main"] == head.sha


def test_commit_that_changes_nothing_returns_the_head(store: HubStore, repo: RepoId) -> None:
    head = commit(store, put(store, "a"))
    assert commit(store, put(store, "a")) == head
    assert len(list(store.history(store.repo(repo), "main"))) == 2


def test_two_stores_on_one_folder_see_each_other(tmp_path: Path) -> None:
    ours, theirs = HubStore(tmp_path), HubStore(tmp_path)
    ours.create_repo(REPO, author="alice")
    head = commit(theirs, put(theirs, "a"))
    assert ours.commit_at(ours.repo(REPO), "main") == head


def test_refs_name_commits_and_go_away(store: HubStore, repo: RepoId) -> None:
    head = commit(store, put(store, "a"))
    store.create_tag(repo, "v1/rc", target="main")
    store.create_branch(repo, "try/this", start=head.sha)
    now = store.repo(repo)
    assert {now.sha_of(name) for name in ("v1/rc", "refs/tags/v1/rc", "try/this", "refs/heads/try/this")} == {head.sha}
    store.delete_tag(repo, "v1/rc")
    store.delete_branch(repo, "try/this")
    with pytest.raises(RevisionNotFound) as refusal:
        store.commit_at(store.repo(repo), "v1/rc")
    assert "expected one of main" in str(refusal.value)


def test_taken_ref_name_is_refused(store: HubStore, repo: RepoId) -> None:
    store.create_tag(repo, "v1", target="main")
    with pytest.raises(AlreadyExists) as refusal:
        store.create_tag(repo, "v1", target="main")
    assert "'v1'" in str(refusal.value)


def test_deleting_main_is_refused(store: HubStore, repo: RepoId) -> None:
    with pytest.raises(HubServerError) as refusal:
        store.delete_branch(repo, "main")
    assert "cannot be deleted" in str(refusal.value)


def test_commit_of_a_deleted_repository_is_gone_from_its_successor(store: HubStore, repo: RepoId) -> None:
    old = commit(store, put(store, "secret"))
    assert store.commit_at(store.repo(repo), old.sha) == old
    store.delete_repo(repo)
    with pytest.raises(RepoNotFound) as refusal:
        store.repo(repo)
    assert "alice/poems" in str(refusal.value)
    store.create_repo(repo, author="alice")
    with pytest.raises(RevisionNotFound):
        store.commit_at(store.repo(repo), old.sha)


@pytest.mark.parametrize(
    ("data", "error"), [(b"not it!", UploadMismatch), (b"short", UploadMismatch), (b"far too long", TooLarge)]
)
def test_upload_of_other_bytes_is_refused(store: HubStore, data: bytes, error: type[HubServerError]) -> None:
    announced = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(error) as refusal:
        upload(store, data, announced, size_bytes=7)
    assert "7 bytes" in str(refusal.value)
    assert not store.objects.lfs_path(announced).exists()
    assert list(store.objects.lfs_path(announced).parent.parent.parent.glob("uploads/*")) == []


def test_large_object_is_stored_once_for_all_repositories(store: HubStore, repo: RepoId) -> None:
    data, other = b"weights", RepoId("bob", "songs")
    sha256 = hashlib.sha256(data).hexdigest()
    store.create_repo(other, author="bob")
    for owner in (repo, other):
        upload(store, data, sha256, size_bytes=len(data))
        store.mark_lfs(owner, sha256)
    assert store.lfs_entry(repo, sha256) == store.lfs_entry(other, sha256)
    assert [path.name for path in store.objects.lfs_path(sha256).parent.iterdir()] == [sha256]


def test_knowing_a_sha256_does_not_open_another_repositorys_file(store: HubStore, repo: RepoId) -> None:
    sha256 = hashlib.sha256(b"weights").hexdigest()
    upload(store, b"weights", sha256, size_bytes=7)
    store.mark_lfs(repo, sha256)
    other = RepoId("bob", "songs")
    store.create_repo(other, author="bob")
    with pytest.raises(UploadMismatch) as refusal:
        store.lfs_entry(other, sha256)
    assert "never uploaded to bob/songs" in str(refusal.value)


def test_leftovers_of_killed_uploads_are_deleted(store: HubStore, tmp_path: Path) -> None:
    left = store.objects.begin_upload("0" * 64, size_bytes=1)
    store.objects.remove_stale_uploads(older_than_s=3600)
    assert any((tmp_path / "hub" / "uploads").iterdir())
    store.objects.remove_stale_uploads(older_than_s=-1)
    assert not any((tmp_path / "hub" / "uploads").iterdir())
    left.close()


# Repositories appear when they are complete, and hold nothing but what is theirs


OTHER = RepoId("bob", "copy")


def put_large(store: HubStore, data: bytes) -> PutFile:
    sha256 = hashlib.sha256(data).hexdigest()
    upload(store, data, sha256, size_bytes=len(data))
    store.mark_lfs(REPO, sha256)
    return PutFile("w", store.lfs_entry(REPO, sha256))


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_failed_duplicate_leaves_nothing(store: HubStore, repo: RepoId, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = commit(store, put(store, "a", b"private"), put_large(store, b"weights"))
    root = store.folder(repo).parents[1]
    before = everything(root)
    with monkeypatch.context() as patch:
        patch.setattr("adapterhub.hubserver.storage.store._save", full_disk)
        for make in (
            lambda: store.duplicate_repo(repo, OTHER, private=True),
            lambda: store.create_repo(OTHER, author="bob"),
        ):
            with pytest.raises(StorageFull):
                make()
    assert everything(root) == before
    store.create_repo(OTHER, author="bob")
    with pytest.raises(RevisionNotFound):
        store.commit_at(store.repo(OTHER), secret.sha)


def full_disk(*_: object) -> None:
    raise StorageFull("the disk is full")


@pytest.mark.parametrize("act", ["create", "move", "duplicate"])
def test_leftovers_of_a_failed_duplicate_do_not_become_part_of_a_repository(
    store: HubStore, repo: RepoId, act: str
) -> None:
    """Adapterhub 0.1 copied in place: a folder of commits and marks under a name that answered 404."""
    secret = commit(store, put(store, "a", b"private"))
    shutil.copytree(store.folder(repo), store.folder(OTHER))
    (store.folder(OTHER) / "repo.json").unlink()
    source = RepoId("alice", "empty")
    store.create_repo(source, author="alice")
    {
        "create": lambda: store.create_repo(OTHER, author="bob"),
        "move": lambda: store.move_repo(source, OTHER),
        "duplicate": lambda: store.duplicate_repo(source, OTHER, private=False),
    }[act]()
    assert len(list((store.folder(OTHER) / "commits").iterdir())) == 1
    with pytest.raises(RevisionNotFound):
        store.commit_at(store.repo(OTHER), secret.sha)


def test_duplicate_has_only_what_refs_reach(store: HubStore, repo: RepoId) -> None:
    upload(store, b"never committed", never := hashlib.sha256(b"never committed").hexdigest(), size_bytes=15)
    store.mark_lfs(repo, never)
    old = commit(store, put_large(store, b"squashed away"))
    kept = commit(store, put_large(store, b"kept"), put(store, "a"))
    squash(store, repo, "main", author="alice", message="one")
    store.create_tag(repo, "v1", target="main")
    store.duplicate_repo(repo, OTHER, private=False)
    copy = store.repo(OTHER)
    assert dict(store.commit_at(copy, "v1").files) == dict(kept.files)
    assert list(store.lfs_marks(OTHER)) == [hashlib.sha256(b"kept").hexdigest()]
    assert store.can_read(OTHER, kept.files["w"])
    for sha in (old.sha, kept.sha):
        with pytest.raises(RevisionNotFound):
            store.commit_at(copy, sha)


def test_permanently_deleted_object_is_not_in_a_duplicate(store: HubStore, repo: RepoId) -> None:
    entry = commit(store, put_large(store, b"gone")).files["w"]
    store.drop_lfs(repo, str(entry.sha256))
    store.duplicate_repo(repo, OTHER, private=False)
    assert not store.can_read(OTHER, entry)


def test_commit_of_an_object_that_was_just_deleted_is_refused(store: HubStore, repo: RepoId) -> None:
    change = put_large(store, b"gone")
    store.drop_lfs(repo, str(change.entry.sha256))
    with pytest.raises(UploadMismatch) as refusal:
        commit(store, change)
    assert "permanently deleted" in str(refusal.value)


def test_owner_may_be_named_like_a_lock(store: HubStore, tmp_path: Path) -> None:
    # As adapterhub 0.1 left it.
    (tmp_path / "hub" / "locks" / "gc.lock").touch()
    store = HubStore(tmp_path / "hub")
    for owner in ("gc.lock", "gc", "a.lock"):
        store.create_repo(RepoId(owner, "songs"), author=owner)
        GarbageCollector(tmp_path / "hub").gc()
        assert store.repo(RepoId(owner, "songs")).branches
