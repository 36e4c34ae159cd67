"""The hub as seen by the real huggingface_hub client, over loopback, from a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_fixtures import ALICE, BOB, LFS_UPLOADS_WARN, PEOPLE, READER, start_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_session,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

pytestmark = LFS_UPLOADS_WARN

BIG = bytes(range(256)) * (44 << 10)
"""11 MiB: above what travels inside a commit"""
CARD = "---\nbase_model: org/base\nlibrary_name: peft\nlicense: mit\ntags: [lora]\n---\n# Poems\n"
CONFIG = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with start_hub(root, PEOPLE) as url:
        yield url


@pytest.fixture(scope="module")
def alice(url: str) -> HfApi:
    return HfApi(endpoint=url, token=ALICE)


@pytest.fixture(scope="module")
def bob(url: str) -> HfApi:
    return HfApi(endpoint=url, token=BOB)


@pytest.fixture(scope="module")
def reader(url: str) -> HfApi:
    return HfApi(endpoint=url, token=READER)


@pytest.fixture(scope="module")
def nobody(url: str) -> HfApi:
    return HfApi(endpoint=url, token=False)


@pytest.fixture
def repo(alice: HfApi, request: pytest.FixtureRequest) -> str:
    """An empty repository of this test's own."""
    name = request.node.name.removeprefix("test_")[:90].split("[")[0]
    return alice.create_repo(f"alice/{name}").repo_id


@pytest.fixture(scope="module")
def adapter(alice: HfApi) -> str:
    """An adapter with a card, a config, weights (11 MiB, by LFS) and a folder; nobody changes it."""
    repo = alice.create_repo("alice/adapter").repo_id
    add(
        alice,
        repo,
        {
            "README.md": CARD.encode(),
            "adapter_config.json": CONFIG.encode(),
            "logs/run 1/log.txt": b"one",
            "logs/other.txt": b"two",
        },
    )
    add_big(alice, repo, "adapter_model.safetensors")
    return repo


def add(api: HfApi, repo: str, files: dict[str, bytes], parent: str | None = None, revision: str | None = None) -> str:
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    done = api.create_commit(
        repo, operations, commit_message="add files", parent_commit=parent, revision=revision, num_threads=1
    )
    return done.oid


def add_big(api: HfApi, repo: str, path: str, data: bytes = BIG) -> str:
    """By a file object: given a path, the client would try Xet, which this hub does not speak."""
    operation = CommitOperationAdd(path, io.BytesIO(data))
    return api.create_commit(repo, [operation], commit_message="add weights").oid


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    assert str(error.value)
    return int(error.value.response.status_code)


# Users and repositories


def test_whoami(alice: HfApi, reader: HfApi) -> None:
    me = alice.whoami()
    assert (me["name"], me["orgs"], me["auth"]["accessToken"]["role"]) == ("alice", [{"name": "team"}], "write")
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"


def test_created_repository_is_there(alice: HfApi, url: str) -> None:
    created = alice.create_repo("alice/made")
    assert (created.repo_id, str(created)) == ("alice/made", f"{url}/alice/made")
    assert alice.create_repo("alice/made", exist_ok=True) == created
    assert alice.repo_exists("alice/made")
    assert [branch.name for branch in alice.list_repo_refs("alice/made").branches] == ["main"]


def test_creating_a_repository_twice_is_refused(alice: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError) as refusal:
        alice.create_repo(repo)
    assert status_of(refusal) == 409


def test_repository_of_another_kind_is_refused(alice: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as refusal:
        alice.create_repo("alice/data", repo_type="dataset")
    assert status_of(refusal) == 400
    assert not alice.repo_exists("alice/data", repo_type="dataset")


def test_deleted_repository_is_gone(alice: HfApi, repo: str) -> None:
    alice.delete_repo(repo)
    assert not alice.repo_exists(repo)
    with pytest.raises(RepositoryNotFoundError) as refusal:
        alice.delete_repo(repo)
    assert status_of(refusal) == 404


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2"])
def test_missing_repository_is_said(alice: HfApi, nobody: HfApi, name: str) -> None:
    for api, status in ((alice, 404), (nobody, 401)):
        with pytest.raises(RepositoryNotFoundError) as refusal:
            api.model_info(name)
        assert status_of(refusal) == status


# Commits and uploads


def test_small_files_are_committed_and_come_back(alice: HfApi, repo: str, tmp_path: Path) -> None:
    files = {"a.json": b"{}", "deep/er/b c.txt": b"b", "empty": b"", "\u00e9\u6a21.txt": b"\x00\xff"}
    sha = add(alice, repo, files)
    folder = Path(alice.snapshot_download(repo, revision=sha, cache_dir=tmp_path))
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_large_file_travels_by_lfs(alice: HfApi, repo: str, tmp_path: Path) -> None:
    source = tmp_path / "adapter_model.safetensors"
    source.write_bytes(BIG)
    with source.open("rb") as file:
        alice.create_commit(repo, [CommitOperationAdd(source.name, file)], commit_message="by file object")
    got = alice.hf_hub_download(repo, source.name, cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == BIG
    (info,) = alice.get_paths_info(repo, source.name)
    assert isinstance(info, RepoFile)
    assert info.lfs is not None
    assert (info.size, info.lfs.sha256, info.xet_hash) == (len(BIG), hashlib.sha256(BIG).hexdigest(), None)


def test_safetensors_up_to_10_mib_go_by_path(alice: HfApi, repo: str, tmp_path: Path) -> None:
    source = tmp_path / "adapter_model.safetensors"
    source.write_bytes(BIG[: 10 << 20])
    alice.upload_file(path_or_fileobj=source, path_in_repo=source.name, repo_id=repo)
    got = alice.hf_hub_download(repo, source.name, cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == source.read_bytes()


def test_folder_is_uploaded(alice: HfApi, repo: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "logs" / "x.txt").write_text("x")
    alice.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert alice.list_repo_files(repo) == ["README.md", "logs/x.txt"]


def test_unchanged_files_make_no_commit(alice: HfApi, repo: str) -> None:
    first = add(alice, repo, {"a": b"a"})
    assert add(alice, repo, {"a": b"a"}) == first
    weights = add_big(alice, repo, "w.safetensors")
    assert add_big(alice, repo, "w.safetensors") == weights


def test_files_and_folders_are_deleted_and_copied(alice: HfApi, repo: str) -> None:
    add(alice, repo, {"a": b"a", "b/c": b"c", "b/d": b"d"})
    add_big(alice, repo, "w")
    alice.delete_file("a", repo)
    alice.delete_folder("b", repo)
    copy = [CommitOperationCopy("w", "kept/w"), CommitOperationDelete("w")]
    alice.create_commit(repo, copy, commit_message="move")
    assert alice.list_repo_files(repo) == ["kept/w"]


def test_deleting_a_missing_file_is_refused(alice: HfApi, repo: str) -> None:
    with pytest.raises(EntryNotFoundError) as refusal:
        alice.delete_file("gone", repo)
    assert "doesn't exist" in str(refusal.value)


def test_readme_with_broken_yaml_is_refused(alice: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match="YAML head") as refusal:
        add(alice, repo, {"README.md": b"---\na: [\n---\n"})
    assert "Invalid metadata" in str(refusal.value)


def test_stale_parent_is_refused(alice: HfApi, repo: str) -> None:
    start = alice.model_info(repo).sha
    add(alice, repo, {"a": b"1"}, parent=start)
    with pytest.raises(HfHubHTTPError) as refusal:
        add(alice, repo, {"b": b"2"}, parent=start)
    assert status_of(refusal) == 412
    assert alice.list_repo_files(repo) == ["a"]


def test_of_eight_racing_commits_one_wins(alice: HfApi, repo: str) -> None:
    start = alice.model_info(repo).sha

    def race(number: int) -> int:
        try:
            add(alice, repo, {f"file{number}": b"mine"}, parent=start)
        except HfHubHTTPError as refusal:
            return int(refusal.response.status_code)
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(race, range(8))) == [200] + [412] * 7
    assert len(alice.list_repo_commits(repo)) == 2


def test_two_processes_serve_one_folder(alice: HfApi, root: Path, repo: str) -> None:
    with start_hub(root, PEOPLE) as second_url:
        assert second_url != alice.endpoint
        second = HfApi(endpoint=second_url, token=ALICE)

        def write(number: int) -> None:
            add((alice, second)[number % 2], repo, {f"file{number}": b"both"})

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(8)))
        assert add_big(second, repo, "w") == alice.model_info(repo).sha
    assert alice.list_repo_files(repo) == [*(f"file{number}" for number in range(8)), "w"]
    assert len(alice.list_repo_commits(repo)) == 10


# Reading


def test_model_is_described(alice: HfApi, adapter: str) -> None:
    info = alice.model_info(adapter, files_metadata=True, expand=None)
    assert (info.id, info.author, info.private, info.library_name) == (adapter, "alice", False, "peft")
    assert info.sha == alice.list_repo_refs(adapter).branches[0].target_commit
    assert info.card_data is not None
    assert info.card_data.base_model == "org/base"
    assert info.config == {"peft": {"base_model_name_or_path": "org/base", "peft_type": "LORA"}}
    assert info.created_at is not None
    assert info.siblings is not None
    files = {file.rfilename: file for file in info.siblings}
    assert files["adapter_config.json"].size == len(CONFIG)
    assert files["adapter_config.json"].lfs is None
    assert files["adapter_model.safetensors"].lfs is not None
    assert files["adapter_model.safetensors"].lfs.sha256 == hashlib.sha256(BIG).hexdigest()


def test_model_at_an_older_commit_is_described(alice: HfApi, adapter: str) -> None:
    older = alice.list_repo_commits(adapter)[1].commit_id
    info = alice.model_info(adapter, revision=older)
    assert info.sha == older
    assert "safetensors" not in (info.tags or [])


def test_expand_is_tolerated(alice: HfApi, adapter: str) -> None:
    assert alice.model_info(adapter, expand=["baseModels", "siblings"]).base_models == {
        "relation": "adapter",
        "models": [{"id": "org/base"}],
    }


def test_filters_must_all_hold(alice: HfApi, adapter: str, repo: str) -> None:
    def found(*tags: str, **query: str) -> list[str]:
        return [model.id for model in alice.list_models(filter=tags, **query)]

    assert found("base_model:adapter:org/base", "lora", "safetensors", "license:mit") == [adapter]
    assert found("base_model:adapter:org/base", "gguf") == []
    assert found("peft", author="bob") == []
    assert found("peft", search="ADAPT") == [adapter]
    assert {adapter, repo} <= set(found(author="alice"))


def test_long_lists_come_in_pages(alice: HfApi, url: str) -> None:
    names = [alice.create_repo(f"team/page-{number}").repo_id for number in range(5)]
    first = get_session().get(f"{url}/api/models", params={"author": "team", "limit": 2})
    assert len(first.json()) == 2
    second = get_session().get(first.links["next"]["url"])
    third = get_session().get(second.links["next"]["url"])
    assert "next" not in third.links
    assert sorted(model["id"] for page in (first, second, third) for model in page.json()) == names
    assert len(list(alice.list_models(author="team", limit=3, sort="created_at"))) == 3


def test_tree_has_folders_and_files(alice: HfApi, adapter: str) -> None:
    top = list(alice.list_repo_tree(adapter))
    assert [entry.path for entry in top] == ["README.md", "adapter_config.json", "adapter_model.safetensors", "logs"]
    assert isinstance(top[-1], RepoFolder)
    below = alice.list_repo_tree(adapter, "logs", recursive=True)
    assert [entry.path for entry in below] == ["logs/other.txt", "logs/run 1", "logs/run 1/log.txt"]
    with pytest.raises(EntryNotFoundError):
        list(alice.list_repo_tree(adapter, "gone"))


def test_paths_info_leaves_out_what_is_missing(alice: HfApi, adapter: str) -> None:
    found = alice.get_paths_info(adapter, ["logs/run 1", "README.md", "gone"])
    assert [entry.path for entry in found] == ["README.md", "logs/run 1"]


def test_file_exists(alice: HfApi, adapter: str) -> None:
    assert alice.file_exists(adapter, "logs/run 1/log.txt")
    assert not alice.file_exists(adapter, "logs")
    assert not alice.file_exists(adapter, "README.md", revision="no-such-branch")


def test_snapshot_at_a_commit_stays_what_it_was(alice: HfApi, repo: str, tmp_path: Path) -> None:
    first = add(alice, repo, {"a": b"1"})
    add(alice, repo, {"a": b"2"})
    assert (Path(alice.snapshot_download(repo, revision=first, cache_dir=tmp_path)) / "a").read_bytes() == b"1"
    assert Path(alice.hf_hub_download(repo, "a", cache_dir=tmp_path)).read_bytes() == b"2"


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40, "refs/pr/1"])
def test_missing_revision_is_said(alice: HfApi, adapter: str, revision: str) -> None:
    with pytest.raises(RevisionNotFoundError) as refusal:
        alice.model_info(adapter, revision=revision)
    assert status_of(refusal) == 404


def test_missing_file_is_said_with_the_commit(alice: HfApi, adapter: str, tmp_path: Path) -> None:
    with pytest.raises(EntryNotFoundError) as refusal:
        alice.hf_hub_download(adapter, "gone", cache_dir=tmp_path)
    assert refusal.value.response.headers["X-Repo-Commit"] == alice.model_info(adapter).sha


# Branches and tags


def test_branches_and_tags_with_slashes(alice: HfApi, repo: str, tmp_path: Path) -> None:
    first = add(alice, repo, {"a": b"1"})
    alice.create_branch(repo, branch="try/this", revision=first)
    alice.create_tag(repo, tag="v1/rc", revision="try/this")
    on_branch = add(alice, repo, {"a": b"2"}, revision="try/this")
    refs = alice.list_repo_refs(repo)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": first, "try/this": on_branch}
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [("v1/rc", "refs/tags/v1/rc", first)]
    assert Path(alice.hf_hub_download(repo, "a", revision="try/this", cache_dir=tmp_path)).read_bytes() == b"2"
    assert Path(alice.hf_hub_download(repo, "a", revision="v1/rc", cache_dir=tmp_path)).read_bytes() == b"1"
    alice.create_branch(repo, branch="try/this", exist_ok=True)
    alice.create_tag(repo, tag="v1/rc", exist_ok=True)
    alice.delete_branch(repo, branch="try/this")
    alice.delete_tag(repo, tag="v1/rc")
    refs = alice.list_repo_refs(repo)
    assert ([branch.name for branch in refs.branches], refs.tags) == (["main"], [])


def test_commits_are_listed_newest_first(alice: HfApi, repo: str) -> None:
    sha = add(alice, repo, {"a": b"1"})
    commits = alice.list_repo_commits(repo)
    assert [(item.title, item.authors) for item in commits] == [("add files", ["alice"]), ("initial commit", ["alice"])]
    assert commits[0].commit_id == sha


# Rights


def test_wrong_token_is_refused(url: str, adapter: str) -> None:
    with pytest.raises(HfHubHTTPError) as refusal:
        HfApi(endpoint=url, token="hub_nobodys_token").model_info(adapter)
    assert status_of(refusal) == 401
    assert not isinstance(refusal.value, RepositoryNotFoundError)


@pytest.mark.parametrize("who", ["reader", "bob"])
def test_writing_without_the_right_is_refused(request: pytest.FixtureRequest, adapter: str, who: str) -> None:
    api: HfApi = request.getfixturevalue(who)
    attempts = (
        lambda: add(api, adapter, {"a": b"a"}),
        lambda: api.create_tag(adapter, tag="v1"),
        lambda: api.update_repo_settings(adapter, private=True),
        lambda: api.delete_repo(adapter),
        lambda: api.create_repo("alice/not-mine"),
    )
    for attempt in attempts:
        with pytest.raises(HfHubHTTPError) as refusal:
            attempt()
        assert status_of(refusal) == 403


def test_writing_without_a_token_is_refused(nobody: HfApi, adapter: str) -> None:
    with pytest.raises(HfHubHTTPError) as refusal:
        add(nobody, adapter, {"a": b"a"})
    assert status_of(refusal) == 401


def test_private_repository_is_hidden_from_others(
    alice: HfApi, bob: HfApi, reader: HfApi, nobody: HfApi, repo: str, tmp_path: Path
) -> None:
    add(alice, repo, {"a": b"secret"})
    alice.update_repo_settings(repo, private=True)
    for api, status in ((bob, 404), (nobody, 401)):
        assert repo not in [model.id for model in api.list_models()]
        for attempt in (
            api.model_info,
            api.auth_check,
            lambda name, api=api: api.hf_hub_download(name, "a", cache_dir=tmp_path),
        ):
            with pytest.raises(RepositoryNotFoundError) as refusal:
                attempt(repo)
            assert status_of(refusal) == status
    assert repo in [model.id for model in reader.list_models()]
    assert Path(reader.hf_hub_download(repo, "a", cache_dir=tmp_path)).read_bytes() == b"secret"
    reader.auth_check(repo)
    alice.update_repo_settings(repo, private=False)
    bob.auth_check(repo)
