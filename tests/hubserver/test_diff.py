"""Diffs of pull requests: right, and bounded whatever is sent."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_fixtures import REPO
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.hubserver.storage import diff as diffs
from adapterhub.hubserver.storage.commit import NewCommit, PutFile, RepoFile
from adapterhub.hubserver.storage.diff import FileChange, git_diff
from adapterhub.hubserver.storage.discussion_store import DiscussionStore
from adapterhub.hubserver.storage.git_ids import lfs_pointer
from adapterhub.hubserver.storage.store import HubStore


def shown(*changes: tuple[bytes | None, bytes | None]) -> str:
    contents: dict[str, bytes] = {}

    def entry(data: bytes | None) -> RepoFile | None:
        if data is None:
            return None
        contents[str(len(contents))] = data
        return RepoFile(blob=str(len(contents) - 1), size=len(data))

    files = [FileChange(f"f{number}", entry(old), entry(new)) for number, (old, new) in enumerate(changes)]
    return git_diff(files, lambda file: contents[file.blob])


LINES = st.lists(st.sampled_from("abc"), max_size=40).map(lambda lines: "".join(f"{line}\n" for line in lines).encode())


@pytest.mark.skipif(shutil.which("patch") is None, reason="applies the diff with the patch program")
@given(old=LINES, new=LINES, aligned=st.sampled_from([0, 5, 500]))
def test_a_diff_leads_from_the_old_text_to_the_new(
    old: bytes, new: bytes, aligned: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("patch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffs, "_MAX_ALIGNED", aligned)
        text = shown((old, new))
    (folder / "f0").write_bytes(old)
    if "@@" in text:
        subprocess.run(["patch", "-p1", "-s"], input=text.encode(), cwd=folder, check=True)
    assert (folder / "f0").read_bytes() == new


def test_added_and_deleted_files_and_bytes_are_named() -> None:
    text = shown((None, b"new\n"), (b"old\n", None), (b"\xff", b"text\n"))
    assert "--- /dev/null\n+++ b/f0\n@@ -0,0 +1 @@\n+new\n" in text
    assert "--- a/f1\n+++ /dev/null\n@@ -1 +0,0 @@\n-old\n" in text
    assert "diff --git a/f2 b/f2\nBinary files differ\n" in text


def test_an_lfs_file_is_shown_as_its_pointer() -> None:
    entry = RepoFile(blob="0", size=9, sha256="1" * 64)
    assert "+size 9\n" in git_diff(
        [FileChange("w", None, entry)], lambda file: lfs_pointer(str(file.sha256), file.size)
    )


def swapped(count: int) -> tuple[bytes, bytes]:
    """Every pair of neighbours swapped: difflib took minutes for 20,000 lines."""
    lines = [b"%d\n" % number for number in range(count)]
    return b"".join(lines), b"".join(lines[at ^ 1] for at in range(count))


HOSTILE: list[Callable[[], list[tuple[bytes | None, bytes | None]]]] = [
    lambda: [swapped(20_000)],
    lambda: [swapped(500)] * 400,
    lambda: [(b"\n" * 100_000, b"\n \n" * 50_000)],
    lambda: [(b"a\n" * (1 << 19), b"b\n" * (1 << 19))] * 5,
    lambda: [(None, b"x" * (1 << 20))] * 100,
    lambda: [(None, b"x")] * 100_000,
]


@pytest.mark.parametrize("changes", HOSTILE)
def test_cost_and_size_of_any_diff_are_bounded(
    changes: Callable[[], list[tuple[bytes | None, bytes | None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned: list[int] = []

    class Counted(diffs.difflib.SequenceMatcher):  # type: ignore[type-arg]
        def __init__(self, junk: None, old: list[str] | str, new: list[str] | str) -> None:
            aligned.append(max(len(old), len(new)))
            super().__init__(junk, old, new)

    monkeypatch.setattr(diffs.difflib, "SequenceMatcher", Counted)
    text = shown(*changes())
    assert max(aligned) <= 500
    assert sum(aligned) <= 5000
    # A line costs two characters more than it has, and the names of 300 files come to some thousand.
    assert len(text) <= 3 * diffs.MAX_BYTES
    assert text.count("diff --git") <= diffs.MAX_FILES


def test_files_beyond_the_bound_are_counted() -> None:
    text = shown(*[(None, b"x\n")] * 302)
    assert text.endswith("# 2 more files differ, which are not shown\n")


def test_a_diff_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HubStore(tmp_path)
    store.create_repo(REPO, author="alice")
    change = PutFile("a", RepoFile(blob=store.objects.put_blob(b"text\n"), size=5))
    discussions = DiscussionStore(store)
    pull = discussions.open(
        REPO, author="bob", title="t", description="", is_pull=True, first=([change], NewCommit("bob", "t"))
    )
    first = discussions.diff(store.repo(REPO), pull)
    assert "+text" in first
    monkeypatch.setattr("adapterhub.hubserver.storage.discussion_store.git_diff", lambda *_: pytest.fail("computed"))
    assert discussions.diff(store.repo(REPO), pull) == first
