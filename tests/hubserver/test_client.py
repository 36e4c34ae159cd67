"""Several users with the real client; `hub_contract.py` has the tests that hold for every Hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_fixtures import ALICE, BOB, LFS_UPLOADS_WARN, PEOPLE, READER, start_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DiscussionWithDetails, HfApi, get_session
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

pytestmark = LFS_UPLOADS_WARN

BIG = bytes(range(256)) * (44 << 10)
"""11 MiB: more than a commit request carries."""
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
    """Commit a file object, which the client uploads by LFS."""
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


def test_repository_of_another_kind_is_refused(alice: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as refusal:
        alice.create_repo("alice/app", repo_type="space", space_sdk="static")
    assert status_of(refusal) == 400
    assert not alice.repo_exists("alice/app", repo_type="space")


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2"])
def test_missing_repository_is_reported(alice: HfApi, nobody: HfApi, name: str) -> None:
    for api, status in ((alice, 404), (nobody, 401)):
        with pytest.raises(RepositoryNotFoundError) as refusal:
            api.model_info(name)
        assert status_of(refusal) == status


# Commits and uploads


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


# Branches and tags


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


def test_gated_repository_gives_files_to_those_let_in(
    alice: HfApi, bob: HfApi, nobody: HfApi, repo: str, tmp_path: Path, url: str
) -> None:
    add(alice, repo, {"a": b"for few"})
    alice.update_repo_settings(repo, gated="manual")
    assert bob.model_info(repo).gated == "manual"
    assert bob.list_repo_files(repo) == ["a"]
    for api, status in ((bob, 403), (nobody, 401)):
        for attempt in (api.auth_check, lambda name, api=api: api.hf_hub_download(name, "a", cache_dir=tmp_path)):
            with pytest.raises(GatedRepoError) as refusal:
                attempt(repo)
            assert status_of(refusal) == status
    assert ask_access(url, repo) == 200
    (request,) = alice.list_pending_access_requests(repo)
    assert request.username == "bob"
    alice.reject_access_request(repo, "bob", rejection_reason="no")
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo)
    alice.accept_access_request(repo, "bob")
    assert [one.username for one in alice.list_accepted_access_requests(repo)] == ["bob"]
    assert Path(bob.hf_hub_download(repo, "a", cache_dir=tmp_path)).read_bytes() == b"for few"
    alice.cancel_access_request(repo, "bob")
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo)
    alice.grant_access(repo, "bob")
    bob.auth_check(repo)


def test_automatic_gate_lets_in_who_asks(alice: HfApi, bob: HfApi, repo: str, url: str) -> None:
    alice.update_repo_settings(repo, gated="auto")
    with pytest.raises(GatedRepoError):
        bob.auth_check(repo)
    assert ask_access(url, repo) == 200
    bob.auth_check(repo)


def ask_access(url: str, repo: str) -> int:
    reply = get_session().post(f"{url}/{repo}/ask-access", headers={"Authorization": f"Bearer {BOB}"})
    return int(reply.status_code)


def test_anybody_who_writes_may_propose_a_change(alice: HfApi, bob: HfApi, reader: HfApi, repo: str) -> None:
    proposal = [CommitOperationAdd("a", b"bob's"), CommitOperationAdd("w", io.BytesIO(BIG))]
    done = bob.create_commit(repo, proposal, commit_message="mine", create_pr=True)
    assert done.pr_num is not None
    add(bob, repo, {"b": b"more"}, revision=done.pr_revision)
    for attempt in (
        lambda: bob.merge_pull_request(repo, done.pr_num),
        lambda: reader.comment_discussion(repo, done.pr_num, "no"),
        lambda: add(bob, repo, {"a": b"at once"}),
    ):
        with pytest.raises(HfHubHTTPError) as refusal:
            attempt()
        assert status_of(refusal) == 403
    assert alice.list_repo_files(repo) == []
    alice.merge_pull_request(repo, done.pr_num)
    assert alice.list_repo_files(repo) == ["a", "b", "w"]


def test_diff_of_a_pull_request_shows_no_gated_file(alice: HfApi, bob: HfApi, nobody: HfApi, repo: str) -> None:
    add(alice, repo, {"a": b"for few"})
    done = alice.create_commit(repo, [CommitOperationDelete("a")], commit_message="less", create_pr=True)
    assert done.pr_num is not None
    assert "-for few" in shown_diff(nobody, repo, done.pr_num)
    alice.update_repo_settings(repo, gated="manual")
    for api in (nobody, bob):
        assert shown_diff(api, repo, done.pr_num) == ""
    alice.grant_access(repo, "bob")
    assert "-for few" in shown_diff(bob, repo, done.pr_num)


def shown_diff(api: HfApi, repo: str, number: int) -> str:
    details = api.get_discussion_details(repo, number)
    assert isinstance(details, DiscussionWithDetails)
    return details.diff or ""


def test_pull_request_whose_base_was_deleted_is_shown(alice: HfApi, repo: str) -> None:
    alice.create_branch(repo, branch="try")
    done = alice.create_commit(
        repo, [CommitOperationAdd("a", b"text")], commit_message="more", create_pr=True, revision="try"
    )
    assert done.pr_num is not None
    alice.delete_branch(repo, branch="try")
    assert "+text" in shown_diff(alice, repo, done.pr_num)
    with pytest.raises(HfHubHTTPError) as refusal:
        alice.merge_pull_request(repo, done.pr_num)
    assert status_of(refusal) == 404


def test_duplicate_of_a_gated_repository_is_gated(alice: HfApi, bob: HfApi, nobody: HfApi, repo: str) -> None:
    alice.update_repo_settings(repo, gated="manual")
    alice.grant_access(repo, "bob")
    copy = bob.duplicate_repo(repo, "bob/copy").repo_id
    assert nobody.model_info(copy).gated == "manual"
    with pytest.raises(GatedRepoError):
        nobody.auth_check(copy)
    bob.auth_check(copy)
    assert list(bob.list_accepted_access_requests(copy)) == []


def test_repository_is_not_moved_to_a_foreign_owner(alice: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError) as refusal:
        alice.move_repo(repo, "bob/gift")
    assert status_of(refusal) == 403


def test_commits_come_in_pages(alice: HfApi, repo: str, url: str) -> None:
    for number in range(3):
        add(alice, repo, {"a": b"%d" % number})
    first = get_session().get(f"{url}/api/models/{repo}/commits/main", params={"limit": 3})
    second = get_session().get(first.links["next"]["url"])
    assert (len(first.json()), [item["title"] for item in second.json()]) == (3, ["initial commit"])
    assert "next" not in second.links
