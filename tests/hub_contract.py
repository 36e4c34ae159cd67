"""What any Hub owes the real, unmodified client: one operation after the other, by one user with a write token.

`test_hubserver_contract.py` runs this against our server. Against the public Hub (it makes and deletes repositories
named `contract-...`):

    ADAPTERHUB_CONTRACT_HUB=https://huggingface.co ADAPTERHUB_CONTRACT_TOKEN=hf_... pytest tests/hub_contract.py
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from safetensors.numpy import save

URL, TOKEN = os.environ.get("ADAPTERHUB_CONTRACT_HUB"), os.environ.get("ADAPTERHUB_CONTRACT_TOKEN")
# What travels by LFS instead of Xet is handed to the HTTP client in a way that one deprecates.
pytestmark = [
    pytest.mark.skipif(URL is None, reason="ADAPTERHUB_CONTRACT_HUB names no Hub"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

BIG = random.Random(7).randbytes(11 << 20)
"""11 MiB that cannot be packed: above what travels inside a commit"""
CARD = "---\nbase_model: org/base\nlibrary_name: peft\nlicense: mit\ntags: [lora]\n---\n# Poems\n"
CONFIG = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8})


@pytest.fixture(scope="module")
def api() -> HfApi:
    return HfApi(endpoint=URL, token=TOKEN)


@pytest.fixture(scope="module")
def me(api: HfApi) -> str:
    return str(api.whoami()["name"])


@pytest.fixture(scope="module")
def new_repo(api: HfApi, me: str) -> Iterator[Callable[[], str]]:
    """Makes an empty repository; all are deleted at the end."""
    made = []

    def make() -> str:
        made.append(api.create_repo(f"{me}/contract-{secrets.token_hex(5)}").repo_id)
        return made[-1]

    yield make
    for repo in made:
        api.delete_repo(repo, missing_ok=True)


@pytest.fixture
def repo(new_repo: Callable[[], str]) -> str:
    """An empty repository of this test's own."""
    return new_repo()


@pytest.fixture(scope="module")
def adapter(api: HfApi, new_repo: Callable[[], str]) -> str:
    """An adapter with a card, a config, weights of 11 MiB and a folder; nobody changes it."""
    repo = new_repo()
    small = {
        "README.md": CARD.encode(),
        "adapter_config.json": CONFIG.encode(),
        "logs/run 1/log.txt": b"one",
        "logs/other.txt": b"two",
    }
    add(api, repo, small)
    add(api, repo, {"adapter_model.safetensors": BIG})
    return repo


def add(api: HfApi, repo: str, files: dict[str, bytes], parent: str | None = None, revision: str | None = None) -> str:
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    done = api.create_commit(repo, operations, commit_message="add files", parent_commit=parent, revision=revision)
    return done.oid


def read(api: HfApi, repo: str, path: str, cache: Path, revision: str | None = None) -> bytes:
    return Path(api.hf_hub_download(repo, path, revision=revision, cache_dir=cache)).read_bytes()


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    assert str(error.value)
    return int(error.value.response.status_code)


# Users and repositories


def test_whoami(api: HfApi) -> None:
    assert api.whoami()["auth"]["accessToken"]["role"] in ("write", "admin", "fineGrained")


def test_create_repo(api: HfApi, repo: str) -> None:
    assert [branch.name for branch in api.list_repo_refs(repo).branches] == ["main"]


def test_create_repo_that_exists(api: HfApi, repo: str) -> None:
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError) as refusal:
        api.create_repo(repo)
    assert status_of(refusal) == 409


def test_repo_exists(api: HfApi, me: str, repo: str) -> None:
    assert api.repo_exists(repo)
    assert not api.repo_exists(f"{me}/contract-never-made")


def test_delete_repo(api: HfApi, repo: str) -> None:
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    api.delete_repo(repo, missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)


def test_missing_repo(api: HfApi, me: str) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(f"{me}/contract-never-made")


def test_visibility(api: HfApi, repo: str) -> None:
    api.update_repo_settings(repo, private=True)
    assert api.model_info(repo).private
    api.update_repo_settings(repo, private=False)
    assert not api.model_info(repo).private


def test_gate(api: HfApi, repo: str) -> None:
    api.update_repo_settings(repo, gated="manual")
    assert api.model_info(repo).gated == "manual"
    assert list(api.list_pending_access_requests(repo)) == []
    api.update_repo_settings(repo, gated=False)
    assert api.model_info(repo).gated is False


def test_move_repo(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"a": b"a"})
    api.move_repo(repo, f"{repo}-moved")
    assert read(api, f"{repo}-moved", "a", tmp_path) == b"a"
    api.delete_repo(f"{repo}-moved")


def test_duplicate_repo(api: HfApi, adapter: str, tmp_path: Path) -> None:
    copy = api.duplicate_repo(adapter, f"{adapter}-copy")
    try:
        assert copy.repo_id == f"{adapter}-copy"
        assert read(api, copy.repo_id, "adapter_model.safetensors", tmp_path) == BIG
        assert api.duplicate_repo(adapter, f"{adapter}-copy", exist_ok=True).repo_id == copy.repo_id
    finally:
        api.delete_repo(copy.repo_id)


def test_auth_check(api: HfApi, me: str, repo: str) -> None:
    api.auth_check(repo)
    api.auth_check(repo, write=True)
    with pytest.raises(RepositoryNotFoundError):
        api.auth_check(f"{me}/contract-never-made")


# Describing and finding


def test_model_info(api: HfApi, adapter: str, me: str) -> None:
    info = api.model_info(adapter)
    assert (info.id, info.author, info.private, info.library_name) == (adapter, me, False, "peft")
    assert info.sha == api.list_repo_refs(adapter).branches[0].target_commit
    assert info.card_data is not None
    assert info.card_data.base_model == "org/base"
    assert {"peft", "lora", "safetensors", "license:mit", "base_model:adapter:org/base"} <= set(info.tags or [])


def test_model_info_with_files(api: HfApi, adapter: str) -> None:
    files = {file.rfilename: file for file in api.model_info(adapter, files_metadata=True).siblings or []}
    assert files["adapter_config.json"].size == len(CONFIG)
    assert files["adapter_config.json"].lfs is None
    assert files["adapter_model.safetensors"].lfs is not None
    assert files["adapter_model.safetensors"].lfs.sha256 == hashlib.sha256(BIG).hexdigest()


def test_model_info_at_an_older_commit(api: HfApi, adapter: str) -> None:
    older = api.list_repo_commits(adapter)[1].commit_id
    info = api.model_info(adapter, revision=older)
    assert info.sha == older
    assert "adapter_model.safetensors" not in [file.rfilename for file in info.siblings or []]


def test_model_info_expanded(api: HfApi, adapter: str) -> None:
    assert api.model_info(adapter, expand=["siblings", "sha"]).siblings


def test_list_models_of_an_author(api: HfApi, adapter: str, me: str) -> None:
    assert adapter in [model.id for model in api.list_models(author=me)]


def test_list_models_by_search(api: HfApi, adapter: str, me: str) -> None:
    name = adapter.partition("/")[2]
    assert [model.id for model in api.list_models(author=me, search=name)] == [adapter]


def test_list_models_by_base(api: HfApi, adapter: str, me: str) -> None:
    filters = ["base_model:adapter:org/base", "lora"]
    assert adapter in [model.id for model in api.list_models(author=me, filter=filters)]
    assert list(api.list_models(author=me, filter=["base_model:adapter:org/base", "gguf"])) == []


def test_list_models_sorted_and_limited(api: HfApi, adapter: str, repo: str, me: str) -> None:
    assert len(list(api.list_models(author=me, limit=1, sort="created_at"))) == 1


# Uploads


def test_upload_small_files(api: HfApi, repo: str, tmp_path: Path) -> None:
    files = {"a.json": b"{}", "deep/er/b c.txt": b"b", "empty": b"", "\u00e9\u6a21.txt": b"\x00\xff"}
    sha = add(api, repo, files)
    folder = Path(api.snapshot_download(repo, revision=sha, cache_dir=tmp_path, ignore_patterns=[".gitattributes"]))
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_upload_big_file_by_path(api: HfApi, repo: str, tmp_path: Path) -> None:
    source = tmp_path / "adapter_model.safetensors"
    source.write_bytes(BIG)
    api.upload_file(path_or_fileobj=source, path_in_repo=source.name, repo_id=repo)
    assert read(api, repo, source.name, tmp_path / "cache") == BIG
    (info,) = api.get_paths_info(repo, source.name)
    assert isinstance(info, RepoFile)
    assert info.lfs is not None
    assert (info.size, info.lfs.sha256) == (len(BIG), hashlib.sha256(BIG).hexdigest())


def test_upload_big_bytes(api: HfApi, repo: str, tmp_path: Path) -> None:
    api.upload_file(path_or_fileobj=BIG, path_in_repo="w", repo_id=repo)
    assert read(api, repo, "w", tmp_path) == BIG


def test_upload_big_file_object(api: HfApi, repo: str, tmp_path: Path) -> None:
    api.upload_file(path_or_fileobj=io.BytesIO(BIG), path_in_repo="w", repo_id=repo)
    assert read(api, repo, "w", tmp_path) == BIG


def test_upload_changed_big_file(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"w": BIG})
    changed = BIG[: 5 << 20] + b"a new middle" + BIG[5 << 20 :]
    add(api, repo, {"w": changed})
    assert read(api, repo, "w", tmp_path) == changed


def test_upload_what_another_repo_has(api: HfApi, adapter: str, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"w": BIG, "half": BIG[::-1]})
    assert read(api, repo, "half", tmp_path) == BIG[::-1]


def test_upload_folder(api: HfApi, repo: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "logs" / "x.txt").write_text("x")
    (tmp_path / "w.safetensors").write_bytes(BIG)
    api.upload_folder(repo_id=repo, folder_path=tmp_path, commit_message="all", ignore_patterns=["*.bin"])
    assert {"README.md", "logs/x.txt", "w.safetensors"} <= set(api.list_repo_files(repo))


def test_upload_folder_replacing(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"old/a.txt": b"a", "keep.json": b"{}"})
    (tmp_path / "new.txt").write_text("new")
    api.upload_folder(repo_id=repo, folder_path=tmp_path, delete_patterns="*.txt")
    files = set(api.list_repo_files(repo))
    assert {"new.txt", "keep.json"} <= files
    assert "old/a.txt" not in files


def test_upload_in_the_background(api: HfApi, repo: str) -> None:
    future = api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, run_as_future=True)
    assert future.result().oid == api.model_info(repo).sha


def test_preuploaded_files(api: HfApi, repo: str, tmp_path: Path) -> None:
    operation = CommitOperationAdd("w", BIG)
    api.preupload_lfs_files(repo, [operation])
    api.create_commit(repo, [operation], commit_message="add")
    assert read(api, repo, "w", tmp_path) == BIG


def test_ignored_files_stay_at_home(api: HfApi, repo: str) -> None:
    add(api, repo, {".gitignore": b"*.log\n!keep.log\nsecret/\n"})
    add(api, repo, {"a.log": b"x", "keep.log": b"x", "secret/key": b"x", "b.txt": b"x"})
    assert {"a.log", "secret/key"}.isdisjoint(api.list_repo_files(repo))
    assert {"keep.log", "b.txt"} <= set(api.list_repo_files(repo))


def test_unchanged_files_make_no_commit(api: HfApi, repo: str) -> None:
    first = add(api, repo, {"a": b"a", "w": BIG})
    assert add(api, repo, {"a": b"a", "w": BIG}) == first


def test_broken_card_is_refused(api: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        add(api, repo, {"README.md": b"---\na: [\n---\n"})


def test_stale_parent_is_refused(api: HfApi, repo: str) -> None:
    start = api.model_info(repo).sha
    add(api, repo, {"a": b"1"}, parent=start)
    with pytest.raises(HfHubHTTPError) as refusal:
        add(api, repo, {"b": b"2"}, parent=start)
    assert status_of(refusal) == 412
    assert "b" not in api.list_repo_files(repo)


def test_of_racing_commits_one_wins(api: HfApi, repo: str) -> None:
    start = api.model_info(repo).sha

    def race(number: int) -> int:
        try:
            add(api, repo, {f"file{number}": b"mine"}, parent=start)
        except HfHubHTTPError as refusal:
            return int(refusal.response.status_code)
        return 200

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(race, range(4))) == [200] + [412] * 3


# Changes


def test_delete_file(api: HfApi, repo: str) -> None:
    add(api, repo, {"a": b"a", "b": b"b"})
    api.delete_file("a", repo)
    assert "a" not in api.list_repo_files(repo)
    with pytest.raises(EntryNotFoundError):
        api.delete_file("gone", repo)


def test_delete_folder(api: HfApi, repo: str) -> None:
    add(api, repo, {"f/a": b"a", "f/g/b": b"b", "c": b"c"})
    api.delete_folder("f", repo)
    assert {"f/a", "f/g/b"}.isdisjoint(api.list_repo_files(repo))


def test_delete_files_by_pattern(api: HfApi, repo: str) -> None:
    add(api, repo, {"a.txt": b"a", "b.txt": b"b", "c.json": b"{}"})
    api.delete_files(repo, ["*.txt"])
    assert {"a.txt", "b.txt"}.isdisjoint(api.list_repo_files(repo))


def test_copy_within_a_repo(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"w": BIG, "small": b"s"})
    copies = [CommitOperationCopy("w", "kept/w"), CommitOperationCopy("small", "kept/s"), CommitOperationDelete("w")]
    api.create_commit(repo, copies, commit_message="move")
    assert {"kept/w", "kept/s", "small"} <= set(api.list_repo_files(repo))
    assert read(api, repo, "kept/w", tmp_path) == BIG


# Downloads


def test_download_twice_uses_the_cache(api: HfApi, adapter: str, tmp_path: Path) -> None:
    first = api.hf_hub_download(adapter, "README.md", cache_dir=tmp_path)
    assert api.hf_hub_download(adapter, "README.md", cache_dir=tmp_path) == first
    assert api.hf_hub_download(adapter, "README.md", cache_dir=tmp_path, local_files_only=True) == first


def test_download_into_a_folder(api: HfApi, adapter: str, tmp_path: Path) -> None:
    api.snapshot_download(adapter, local_dir=tmp_path, allow_patterns=["*.json", "logs/*"])
    assert (tmp_path / "adapter_config.json").read_text() == CONFIG
    assert (tmp_path / "logs" / "run 1" / "log.txt").read_bytes() == b"one"
    assert not (tmp_path / "README.md").exists()


def test_download_at_a_commit(api: HfApi, repo: str, tmp_path: Path) -> None:
    first = add(api, repo, {"a": b"1"})
    add(api, repo, {"a": b"2"})
    assert read(api, repo, "a", tmp_path, revision=first) == b"1"
    assert read(api, repo, "a", tmp_path) == b"2"


def test_download_of_a_missing_file(api: HfApi, adapter: str, tmp_path: Path) -> None:
    with pytest.raises(EntryNotFoundError) as refusal:
        api.hf_hub_download(adapter, "gone", cache_dir=tmp_path)
    assert refusal.value.response.headers["X-Repo-Commit"] == api.model_info(adapter).sha
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download(adapter, "gone", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40, "refs/pr/99"])
def test_missing_revision(api: HfApi, adapter: str, revision: str) -> None:
    with pytest.raises(RevisionNotFoundError):
        api.model_info(adapter, revision=revision)


def test_file_exists(api: HfApi, adapter: str) -> None:
    assert api.file_exists(adapter, "logs/run 1/log.txt")
    assert not api.file_exists(adapter, "gone.txt")
    assert not api.file_exists(adapter, "README.md", revision="no-such-branch")


def test_revision_exists(api: HfApi, adapter: str) -> None:
    assert api.revision_exists(adapter, "main")
    assert not api.revision_exists(adapter, "no-such-branch")


def test_file_metadata(api: HfApi, adapter: str) -> None:
    url = hf_hub_url(adapter, "adapter_model.safetensors", endpoint=URL)
    found = get_hf_file_metadata(url, token=TOKEN)
    assert (found.size, found.etag) == (len(BIG), hashlib.sha256(BIG).hexdigest())
    assert found.commit_hash == api.model_info(adapter).sha


def test_list_repo_tree(api: HfApi, adapter: str) -> None:
    top = {entry.path: entry for entry in api.list_repo_tree(adapter)}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "logs"} <= set(top)
    assert isinstance(top["logs"], RepoFolder)
    below = api.list_repo_tree(adapter, "logs", recursive=True, expand=True)
    assert [entry.path for entry in below] == ["logs/other.txt", "logs/run 1", "logs/run 1/log.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(adapter, "gone"))


def test_paths_info(api: HfApi, adapter: str) -> None:
    found = api.get_paths_info(adapter, ["logs/run 1", "README.md", "gone"])
    assert {entry.path for entry in found} == {"README.md", "logs/run 1"}


def test_safetensors_header_is_read_by_range(api: HfApi, repo: str) -> None:
    import numpy as np

    add(api, repo, {"model.safetensors": save({"x": np.zeros((2, 3), np.float32)}, {"format": "pt"})})
    (file,) = api.get_safetensors_metadata(repo).files_metadata.values()
    assert file.tensors["x"].shape == [2, 3]


def test_file_system(adapter: str) -> None:
    fs = HfFileSystem(endpoint=URL, token=TOKEN)
    assert f"{adapter}/logs" in fs.ls(adapter, detail=False)
    assert fs.cat_file(f"{adapter}/logs/other.txt") == b"two"
    assert fs.glob(f"{adapter}/**/log.txt") == [f"{adapter}/logs/run 1/log.txt"]
    with fs.open(f"{adapter}/adapter_model.safetensors") as file:
        file.seek(1 << 20)
        assert file.read(5) == BIG[1 << 20 : (1 << 20) + 5]


def test_file_system_writes(api: HfApi, repo: str, tmp_path: Path) -> None:
    fs = HfFileSystem(endpoint=URL, token=TOKEN)
    with fs.open(f"{repo}/notes.txt", "w") as file:
        file.write("written")
    assert read(api, repo, "notes.txt", tmp_path) == b"written"


# Versions


def test_branch(api: HfApi, repo: str, tmp_path: Path) -> None:
    first = add(api, repo, {"a": b"1"})
    api.create_branch(repo, branch="try/this", revision=first)
    api.create_branch(repo, branch="try/this", exist_ok=True)
    add(api, repo, {"a": b"2"}, revision="try/this")
    assert read(api, repo, "a", tmp_path, revision="try/this") == b"2"
    assert read(api, repo, "a", tmp_path) == b"1"
    api.delete_branch(repo, branch="try/this")
    assert [branch.name for branch in api.list_repo_refs(repo).branches] == ["main"]


def test_branch_that_exists_is_refused(api: HfApi, repo: str) -> None:
    api.create_branch(repo, branch="twice")
    with pytest.raises(HfHubHTTPError) as refusal:
        api.create_branch(repo, branch="twice")
    assert status_of(refusal) == 409


def test_tag(api: HfApi, repo: str, tmp_path: Path) -> None:
    first = add(api, repo, {"a": b"1"})
    api.create_tag(repo, tag="v1.0", revision=first, tag_message="the first")
    add(api, repo, {"a": b"2"})
    assert read(api, repo, "a", tmp_path, revision="v1.0") == b"1"
    assert [(tag.name, tag.ref) for tag in api.list_repo_refs(repo).tags] == [("v1.0", "refs/tags/v1.0")]
    api.create_tag(repo, tag="v1.0", exist_ok=True)
    api.delete_tag(repo, tag="v1.0")
    assert api.list_repo_refs(repo).tags == []


def test_list_repo_commits(api: HfApi, repo: str, me: str) -> None:
    sha = add(api, repo, {"a": b"1"})
    commits = api.list_repo_commits(repo, formatted=True)
    assert (commits[0].commit_id, commits[0].title, commits[0].authors) == (sha, "add files", [me])
    assert len(commits) == 2


def test_super_squash(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"a": b"1"})
    add(api, repo, {"a": b"2"})
    api.super_squash_history(repo, commit_message="all in one")
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["all in one"]
    assert read(api, repo, "a", tmp_path) == b"2"


def test_lfs_file_is_deleted_for_good(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"w": BIG, "a": b"a"})
    (file,) = api.list_lfs_files(repo)
    assert (file.filename, file.size, file.file_oid) == ("w", len(BIG), hashlib.sha256(BIG).hexdigest())
    api.permanently_delete_lfs_files(repo, [file])
    assert list(api.list_lfs_files(repo)) == []
    assert "w" not in api.list_repo_files(repo)
    assert read(api, repo, "a", tmp_path) == b"a"


# Discussions and pull requests


def test_discussion(api: HfApi, repo: str, me: str) -> None:
    opened = api.create_discussion(repo, title="a question", description="Why?")
    assert (opened.num, opened.title, opened.author, opened.status) == (1, "a question", me, "open")
    assert [event.content for event in opened.events] == ["Why?"]
    assert not opened.is_pull_request


@pytest.mark.filterwarnings("ignore:Hidden comments:UserWarning")
def test_comments(api: HfApi, repo: str) -> None:
    num = api.create_discussion(repo, title="a question").num
    comment = api.comment_discussion(repo, num, "a comment")
    assert api.edit_discussion_comment(repo, num, comment.id, "a better one").content == "a better one"
    assert api.get_discussion_details(repo, num).events[-1].content == "a better one"
    assert api.hide_discussion_comment(repo, num, comment.id).hidden


def test_discussion_is_renamed_and_closed(api: HfApi, repo: str) -> None:
    num = api.create_discussion(repo, title="a question").num
    event = api.rename_discussion(repo, num, "an answer")
    assert (event.old_title, event.new_title) == ("a question", "an answer")
    assert api.change_discussion_status(repo, num, "closed", comment="done").new_status == "closed"
    assert api.get_discussion_details(repo, num).status == "closed"


def test_discussions_are_listed(api: HfApi, repo: str, me: str) -> None:
    closed = api.create_discussion(repo, title="a question").num
    api.change_discussion_status(repo, closed, "closed")
    pull = api.create_pull_request(repo, title="a draft").num

    def numbers(**asked: str) -> list[int]:
        return [one.num for one in api.get_repo_discussions(repo, **asked)]

    assert numbers() == [pull, closed]
    assert numbers(discussion_type="pull_request") == [pull]
    assert numbers(discussion_status="closed") == [closed]
    assert numbers(author=me) == [pull, closed]


def test_pull_request_from_a_commit(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"a.txt": b"one\ntwo\n"})
    done = api.create_commit(
        repo,
        [CommitOperationAdd("a.txt", b"one\n2\n"), CommitOperationAdd("w", BIG)],
        commit_message="digits",
        commit_description="They are shorter.",
        create_pr=True,
    )
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert read(api, repo, "a.txt", tmp_path, revision="refs/pr/1") == b"one\n2\n"
    assert read(api, repo, "a.txt", tmp_path) == b"one\ntwo\n"
    details = api.get_discussion_details(repo, 1)
    assert (details.title, details.status, details.target_branch) == ("digits", "open", "refs/heads/main")
    assert details.diff is not None
    assert "-two\n+2\n" in details.diff
    refs = api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []
    assert [(ref.ref, ref.target_commit) for ref in refs] == [("refs/pr/1", done.oid)]


def test_pull_request_grows_and_is_merged(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"a": b"1", "b": b"1"})
    pull = api.create_pull_request(repo, title="better")
    assert pull.status == "draft"
    add(api, repo, {"a": b"2", "w": BIG}, revision=pull.git_reference)
    api.change_discussion_status(repo, pull.num, "open")
    # What happens on main meanwhile is kept.
    add(api, repo, {"b": b"2"})
    api.merge_pull_request(repo, pull.num)
    assert [read(api, repo, path, tmp_path) for path in ("a", "b", "w")] == [b"2", b"2", BIG]
    merged = api.get_discussion_details(repo, pull.num)
    assert (merged.status, merged.merge_commit_oid) == ("merged", api.model_info(repo).sha)


def test_pull_request_in_conflict_is_not_merged(api: HfApi, repo: str, tmp_path: Path) -> None:
    add(api, repo, {"a": b"1"})
    pull = api.create_commit(repo, [CommitOperationAdd("a", b"2")], commit_message="two", create_pr=True)
    add(api, repo, {"a": b"3"})
    assert pull.pr_num is not None
    assert api.get_discussion_details(repo, pull.pr_num).conflicting_files
    with pytest.raises(HfHubHTTPError):
        api.merge_pull_request(repo, pull.pr_num)
    assert read(api, repo, "a", tmp_path) == b"3"


# Data sets


def test_dataset(api: HfApi, me: str, tmp_path: Path) -> None:
    name = f"{me}/contract-{secrets.token_hex(5)}"
    assert str(api.create_repo(name, repo_type="dataset")) == f"{URL}/datasets/{name}"
    try:
        for path, data in (("data/train.jsonl", b'{"a": 1}\n'), ("data/big.bin", BIG)):
            api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=name, repo_type="dataset")
        info = api.dataset_info(name)
        assert {"data/train.jsonl", "data/big.bin"} <= {file.rfilename for file in info.siblings or []}
        got = Path(api.snapshot_download(name, repo_type="dataset", cache_dir=tmp_path))
        assert (got / "data" / "big.bin").read_bytes() == BIG
        assert name in [found.id for found in api.list_datasets(author=me)]
        assert not api.repo_exists(name)
    finally:
        api.delete_repo(name, repo_type="dataset")


def test_dataset_and_model_of_one_name_are_two(api: HfApi, repo: str, tmp_path: Path) -> None:
    api.create_repo(repo, repo_type="dataset")
    try:
        add(api, repo, {"a": b"model"})
        api.upload_file(path_or_fileobj=b"data", path_in_repo="a", repo_id=repo, repo_type="dataset")
        got = api.hf_hub_download(repo, "a", repo_type="dataset", cache_dir=tmp_path)
        assert (Path(got).read_bytes(), read(api, repo, "a", tmp_path)) == (b"data", b"model")
    finally:
        api.delete_repo(repo, repo_type="dataset")


# Cards


def test_card_is_pushed_changed_and_loaded(api: HfApi, repo: str) -> None:
    from huggingface_hub import ModelCard, metadata_update

    add(api, repo, {"README.md": CARD.encode()})
    metadata_update(repo, {"license": "apache-2.0"}, overwrite=True, token=TOKEN)
    card = ModelCard.load(repo, token=TOKEN)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "org/base")
