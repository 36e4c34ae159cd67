"""Quotas, the audit log, uploads in parts, and pages."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from fastapi import Request
from hub_fixtures import ALICE, BOB, LFS_UPLOADS_WARN, PEOPLE, REPO, objects, start_hub, upload
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from adapterhub.errors import StorageFull
from adapterhub.files import sha256_of
from adapterhub.hubserver.app import create_hub_app
from adapterhub.hubserver.auth.audit import AuditLog, AuditMiddleware
from adapterhub.hubserver.auth.tokens import Account, Tokens
from adapterhub.hubserver.errors import QuotaExceeded, StoreBusy, UploadMismatch
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.routes.bodies import stream_body
from adapterhub.hubserver.storage.commit import NewCommit, PutFile
from adapterhub.hubserver.storage.quotas import Limits, Quotas
from adapterhub.hubserver.storage.store import HubStore

LIMITS = Limits(repo_bytes=20_000, owner_bytes=30_000, part_bytes=1000)
USERS = Tokens.of({ALICE: Account("alice", "write", ("*",)), BOB: Account("bob", "write")})
"""Alice may write for every owner, so that each test can have an owner, and thus a quota, of its own."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with start_hub(root, USERS, LIMITS) as url:
        yield url


@pytest.fixture
def repo(url: str, request: pytest.FixtureRequest) -> str:
    """An empty repository of an owner that only this test uses."""
    owner = re.sub(r"\W+", "-", request.node.name.removeprefix("test_"))[-90:].strip("-_")
    return HfApi(endpoint=url, token=ALICE).create_repo(f"{owner}/poems").repo_id


def ask(url: str, method: str, path: str, token: str | None = ALICE, **options: Any) -> Any:
    headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    return get_session().request(method, f"{url}{path}", headers=headers, **options)


def batch(url: str, repo: str, data: bytes, *transfers: str) -> Any:
    oid = hashlib.sha256(data).hexdigest()
    body = {"operation": "upload", "transfers": transfers, "objects": [{"oid": oid, "size": len(data)}]}
    return ask(url, "POST", f"/{repo}.git/info/lfs/objects/batch", json=body).json()


# Quotas


def test_object_beyond_the_quota_is_refused_before_it_is_sent(url: str, repo: str) -> None:
    (answer,) = batch(url, repo, bytes(20_001), "basic")["objects"]
    assert (answer["error"]["code"], "do not fit" in answer["error"]["message"]) == (413, True)


def test_objects_that_together_exceed_the_quota_are_refused(url: str, repo: str) -> None:
    sizes = {"a": 15_000, "b": 6_000, "c": 5_000}
    wanted = [{"oid": oid * 64, "size": sizes[oid]} for oid in "aabc"]
    body = {"operation": "upload", "objects": wanted}
    answers = ask(url, "POST", f"/{repo}.git/info/lfs/objects/batch", json=body).json()["objects"]
    assert [answer.get("error", {}).get("code") for answer in answers] == [None, None, 413, None]


class LfsSender:
    """Uploads large objects to a hub in this process, to URLs that it requested before."""

    def __init__(self, root: Path, limits: Limits) -> None:
        app = create_hub_app(root, PEOPLE, limits=limits)
        self._client = TestClient(app, headers={"Authorization": f"Bearer {ALICE}"})

    def offer(self, data: bytes, *transfers: str) -> dict[str, Any]:
        wanted = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
        body = {"operation": "upload", "transfers": transfers, "objects": [wanted]}
        (answer,) = self._client.post(f"/{REPO}.git/info/lfs/objects/batch", json=body).json()["objects"]
        upload: dict[str, Any] = answer["actions"]["upload"]
        return upload

    def put(self, address: str, data: bytes) -> int:
        return self._client.put(address, content=data).status_code

    def put_parts(self, upload: dict[str, Any], data: bytes) -> list[int]:
        size = int(upload["header"]["chunk_size"])
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        return [self.put(upload["header"][str(number)], part) for number, part in enumerate(parts, 1)]

    def finish(self, upload: dict[str, Any], data: bytes) -> int:
        parts = [{"partNumber": int(name), "etag": "x"} for name in upload["header"] if name.isdigit()]
        body = {"oid": hashlib.sha256(data).hexdigest(), "parts": parts}
        return self._client.post(upload["href"], json=body).status_code


def test_objects_offered_apart_that_together_exceed_the_quota_are_refused(store: HubStore, tmp_path: Path) -> None:
    sender = LfsSender(tmp_path, Limits(repo_bytes=10, free_bytes=0))
    first, second = b"a" * 8, b"b" * 8
    addresses = [sender.offer(data, "basic")["href"] for data in (first, second)]
    # The first once more: an answer may get lost, and it takes its room only once.
    sent = [(0, first), (1, second), (0, first)]
    assert [sender.put(addresses[number], data) for number, data in sent] == [200, 413, 200]
    assert objects(tmp_path) == {first}


def test_objects_sent_at_once_that_exceed_the_quota_are_refused(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = LfsSender(tmp_path, Limits(repo_bytes=10, free_bytes=0))
    address = sender.offer(b"b" * 8, "basic")["href"]

    async def another_is_quicker(request: Request, write: Callable[[bytes], None]) -> None:
        await stream_body(request, write)
        upload(store, b"a" * 8)

    monkeypatch.setattr("adapterhub.hubserver.routes.lfs.stream_body", another_is_quicker)
    assert sender.put(address, b"b" * 8) == 413
    assert store.stored_bytes(store.repo(REPO)) == 8


def test_parts_offered_apart_that_together_exceed_the_quota_are_refused(store: HubStore, tmp_path: Path) -> None:
    sender = LfsSender(tmp_path, Limits(repo_bytes=10, free_bytes=0, part_bytes=5))
    first, second, third = b"a" * 8, b"b" * 8, b"c" * 8
    uploads = [sender.offer(data, "multipart") for data in (first, second, third)]
    assert sender.put_parts(uploads[0], first) + sender.put_parts(uploads[1], second) == [200] * 4
    assert [sender.finish(uploads[0], first), sender.finish(uploads[1], second)] == [200, 413]
    assert sender.put_parts(uploads[2], third) == [413, 413]
    assert store.stored_bytes(store.repo(REPO)) == 8


def test_object_for_which_the_disk_has_no_room_any_more_is_refused(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = LfsSender(tmp_path, Limits(free_bytes=100, part_bytes=5))
    whole, parts, late = b"a" * 5, b"b" * 8, b"c" * 8
    address = sender.offer(whole, "basic")["href"]
    uploads = [sender.offer(data, "multipart") for data in (parts, late)]
    assert sender.put_parts(uploads[0], parts) == [200, 200]
    monkeypatch.setattr("adapterhub.hubserver.storage.quotas.shutil.disk_usage", lambda _: SimpleNamespace(free=104))
    assert sender.put(address, whole) == 507
    # The last part is smaller, and still fits.
    assert sender.put_parts(uploads[1], late) == [507, 200]
    # What has come in parts takes no more room when it is finished.
    assert sender.finish(uploads[0], parts) == 200


def test_small_files_count_too(url: str, repo: str) -> None:
    def commit(size: int) -> int:
        lines = [
            {"key": "header", "value": {"summary": "x"}},
            {"key": "file", "value": {"path": "a", "content": "x" * size}},
        ]
        body = "\n".join(map(json.dumps, lines))
        return int(ask(url, "POST", f"/api/models/{repo}/commit/main", content=body).status_code)

    # The same path again and again: what it was before is kept, too.
    assert [commit(6000), commit(6001), commit(6002), commit(6003)] == [200, 200, 200, 413]


def test_chunks_beyond_the_quota_are_refused(url: str, repo: str) -> None:
    token = ask(url, "GET", f"/api/models/{repo}/xet-write-token/main").json()["accessToken"]
    reply = ask(url, "POST", f"/v1/xorbs/default/{'0' * 64}", token=token, content=bytes(20_001))
    assert (reply.status_code, "do not fit" in reply.json()["error"]) == (413, True)


@pytest.fixture
def store(tmp_path: Path) -> HubStore:
    store = HubStore(tmp_path)
    store.create_repo(REPO, author="alice")
    return store


def test_quota_of_an_owner_counts_all_repositories(store: HubStore, tmp_path: Path) -> None:
    other = RepoId.parse("datasets/alice/songs")
    store.create_repo(other, author="alice")
    upload(store, b"x" * 900, other)
    quotas = Quotas(store, tmp_path, Limits(owner_bytes=1000, free_bytes=0))
    quotas.check(REPO, added_bytes=100)
    with pytest.raises(QuotaExceeded) as refusal:
        quotas.check(REPO, added_bytes=101)
    assert "alice/ uses" in str(refusal.value)


def test_disk_is_not_filled_to_the_brim(store: HubStore, tmp_path: Path) -> None:
    with pytest.raises(StorageFull) as refusal:
        Quotas(store, tmp_path, Limits(free_bytes=10**18)).check(REPO, added_bytes=1)
    assert "hub gc" in str(refusal.value)


@pytest.mark.parametrize("act", ["duplicate", "move"])
@pytest.mark.parametrize(("sizes", "status"), [((400, 400), 413), ((400, 100), 200)])
def test_what_is_moved_or_duplicated_counts(tmp_path: Path, act: str, sizes: tuple[int, int], status: int) -> None:
    limits = Limits(owner_bytes=2000, free_bytes=0)
    client = TestClient(create_hub_app(tmp_path, USERS, limits=limits), headers={"Authorization": f"Bearer {ALICE}"})
    store = HubStore(tmp_path)
    for owner, size in zip(("alice", "team"), sizes, strict=True):
        repo_id = RepoId.parse(f"{owner}/poems")
        store.create_repo(repo_id, author="alice")
        upload(store, os.urandom(3 * size), repo_id)
    request = {
        "duplicate": ("/api/models/alice/poems/duplicate", {"repository": "team/copy"}),
        "move": ("/api/repos/move", {"fromRepo": "alice/poems", "toRepo": "team/copy"}),
    }[act]
    reply = client.post(request[0], json=request[1])
    assert reply.status_code == status
    assert [repo.id for repo in store.repos("model", "team")] == ["team/copy"] * (status == 200) + ["team/poems"]


# The audit log


def test_every_change_is_noted_with_who_and_what(url: str, root: Path, repo: str) -> None:
    before = len((root / "audit.jsonl").read_text().splitlines())
    ask(url, "POST", f"/api/models/{repo}/tag/main", json={"tag": "v1"})
    ask(url, "DELETE", f"/api/models/{repo}/tag/v1", token=BOB)
    ask(url, "POST", "/api/validate-yaml", token=None, json={"content": ""})
    ask(url, "GET", f"/api/models/{repo}")
    lines = [json.loads(line) for line in (root / "audit.jsonl").read_text().splitlines()[before:]]
    assert [(line["user"], line["method"], line["path"], line["status"]) for line in lines] == [
        ("alice", "POST", f"/api/models/{repo}/tag/main", 200),
        ("bob", "DELETE", f"/api/models/{repo}/tag/v1", 403),
        (None, "POST", "/api/validate-yaml", 200),
    ]
    assert (root / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_change_that_breaks_is_noted(store: HubStore, tmp_path: Path) -> None:
    (store.folder(REPO) / "repo.json").write_text("cut of")
    client = TestClient(create_hub_app(tmp_path, PEOPLE), raise_server_exceptions=False)
    path = f"/api/models/{REPO}/branch/try"
    assert client.post(path, json={}, headers={"Authorization": f"Bearer {ALICE}"}).status_code == 500
    (line,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert (line["user"], line["path"], line["status"]) == ("alice", path, 500)


def test_change_that_is_cancelled_is_noted(tmp_path: Path) -> None:
    async def cancelled(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    scope = {"type": "http", "method": "POST", "raw_path": b"/x"}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(AuditMiddleware(cancelled, AuditLog(tmp_path / "log"))(scope, nothing, nothing))
    assert json.loads((tmp_path / "log").read_text())["path"] == "/x"


def test_audit_log_keeps_no_permissions(url: str, root: Path, repo: str) -> None:
    (answer,) = batch(url, repo, b"signed", "basic")["objects"]
    get_session().put(answer["actions"]["upload"]["href"], content=b"signed")
    log = (root / "audit.jsonl").read_text()
    assert f"/api/uploads/{repo}/" in log
    assert "signature" not in log


# LFS in parts


def parts_of(url: str, repo: str, data: bytes) -> dict[str, Any]:
    reply = batch(url, repo, data, "basic", "multipart")
    assert reply["transfer"] == "multipart"
    upload: dict[str, Any] = reply["objects"][0]["actions"]["upload"]
    return upload


def finish(upload: dict[str, Any], data: bytes, count: int) -> Any:
    parts = [{"partNumber": number, "etag": "x"} for number in range(1, count + 1)]
    return get_session().post(upload["href"], json={"oid": hashlib.sha256(data).hexdigest(), "parts": parts})


def test_object_comes_in_parts_in_any_order(url: str, root: Path, repo: str) -> None:
    data = os.urandom(2500)
    upload = parts_of(url, repo, data)
    assert upload["header"].keys() == {"chunk_size", "1", "2", "3"}
    for number in (3, 1, 2, 1):
        reply = get_session().put(upload["header"][str(number)], content=data[(number - 1) * 1000 : number * 1000])
        assert (reply.status_code, reply.headers["ETag"]) == (200, f'"{number}"')
    assert finish(upload, data, 3).status_code == 200
    sha256 = hashlib.sha256(data).hexdigest()
    assert (root / "objects" / "lfs" / sha256).read_bytes() == data
    body = {"oid": sha256, "size": len(data)}
    assert ask(url, "POST", f"/{repo}.git/info/lfs/verify", json=body).status_code == 200


def test_finish_that_is_sent_again_is_answered_as_before(url: str, root: Path, repo: str) -> None:
    data = os.urandom(1500)
    upload = parts_of(url, repo, data)
    for number in (1, 2):
        get_session().put(upload["header"][str(number)], content=data[(number - 1) * 1000 : number * 1000])
    (spool,) = parse_qs(urlsplit(upload["href"]).query)["spool"]
    with HubStore(root).objects.open_part(spool, start=0, end=1000):
        reply = finish(upload, data, 2)
    # A client tries again after 503, and only then.
    assert (reply.status_code, "try again" in reply.json()["error"]) == (503, True)
    assert [finish(upload, data, 2).status_code for _ in range(2)] == [200, 200]


@LFS_UPLOADS_WARN
def test_client_sends_parts(url: str, repo: str) -> None:
    from huggingface_hub import lfs

    data = os.urandom(3500)
    operation = CommitOperationAdd("w", data)
    answer = batch(url, repo, data, "basic", "multipart")["objects"][0]
    lfs.lfs_upload(operation=operation, lfs_batch_action=answer, token=ALICE, endpoint=url)
    assert batch(url, repo, data, "basic")["objects"] == [{"oid": hashlib.sha256(data).hexdigest(), "size": 3500}]


@pytest.mark.parametrize(("sent", "status"), [(1001, 413), (999, 400)])
def test_part_of_another_size_is_refused(url: str, repo: str, sent: int, status: int) -> None:
    upload = parts_of(url, repo, os.urandom(2000))
    assert get_session().put(upload["header"]["1"], content=bytes(sent)).status_code == status


def test_parts_that_make_another_object_are_refused(url: str, root: Path, repo: str) -> None:
    data = os.urandom(1500)
    upload = parts_of(url, repo, data)
    get_session().put(upload["header"]["1"], content=bytes(1000))
    get_session().put(upload["header"]["2"], content=bytes(500))
    assert finish(upload, data, 1).status_code == 400
    reply = finish(upload, data, 2)
    assert (reply.status_code, "the parts have" in reply.json()["error"]) == (400, True)
    reply = finish(upload, data, 2)
    assert (reply.status_code, "start it again" in reply.json()["error"]) == (400, True)
    assert not (root / "objects" / "lfs" / hashlib.sha256(data).hexdigest()).exists()


def test_address_of_a_part_serves_for_nothing_else(url: str, repo: str) -> None:
    upload = parts_of(url, repo, os.urandom(1500))
    for old, new in (("part=1", "part=2"), ("spool=", "spool=0"), ("&part=1", "")):
        assert get_session().put(upload["header"]["1"].replace(old, new), content=bytes(500)).status_code == 403
    assert get_session().put(upload["href"], content=bytes(1500)).status_code == 400


def parts_here(store: HubStore, data: bytes) -> tuple[str, dict[str, Any]]:
    """Upload an object as one part; return its name and the arguments of `finish_parts`."""
    name = store.objects.new_parts()
    with store.objects.open_part(name, start=0, end=len(data)) as part:
        part.write(data)
    return name, {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def test_part_still_open_holds_up_the_finish_and_cannot_spoil_the_object(store: HubStore, tmp_path: Path) -> None:
    name, announced = parts_here(store, b"what was checked")
    with store.objects.open_part(name, start=0, end=99) as late:
        with pytest.raises(StoreBusy) as refusal:
            store.objects.finish_parts(name, **announced)
        assert "still being sent" in str(refusal.value)
        assert objects(tmp_path) == set()
        late.write(b"what")
    store.objects.finish_parts(name, **announced)
    assert objects(tmp_path) == {b"what was checked"}
    with pytest.raises(UploadMismatch) as refusal:
        store.objects.open_part(name, start=0, end=99)
    assert "finished or dropped" in str(refusal.value)


def test_part_opened_while_the_object_is_finished_is_refused(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, announced = parts_here(store, b"what was checked")
    finish, lock = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.flock

    def finished_before(file: Any, how: int) -> None:
        if how != finish:
            store.objects.finish_parts(name, **announced)
        lock(file, how)

    monkeypatch.setattr("adapterhub.hubserver.storage.objects.fcntl.flock", finished_before)
    with pytest.raises(UploadMismatch) as refusal:
        store.objects.open_part(name, start=0, end=99)
    assert "finished or dropped" in str(refusal.value)
    assert objects(tmp_path) == {b"what was checked"}


def test_two_finishes_at_once_store_one_object(
    store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, announced = parts_here(store, b"once")
    said: list[str] = []

    def finished_meanwhile(path: Path) -> str:
        with pytest.raises(StoreBusy) as refusal:
            store.objects.finish_parts(name, **announced)
        said.append(str(refusal.value))
        return sha256_of(path)

    monkeypatch.setattr("adapterhub.hubserver.storage.objects.sha256_of", finished_meanwhile)
    store.objects.finish_parts(name, **announced)
    assert ("being finished" in said[0], objects(tmp_path)) == (True, {b"once"})


def test_object_that_is_here_is_not_replaced_by_parts(store: HubStore, tmp_path: Path) -> None:
    sha256 = upload(store, b"shared")
    inode = store.objects.lfs_path(sha256).stat().st_ino
    name, announced = parts_here(store, b"shared")
    store.objects.finish_parts(name, **announced)
    assert store.objects.lfs_path(sha256).stat().st_ino == inode
    assert list((tmp_path / "uploads").iterdir()) == []


# Pages


HOSTILE = """---
base_model: org/base
tags: ["<script>alert(1)</script>"]
---
# Poems <script>alert(2)</script>
[click](javascript:alert(3)) ![img](http://evil/x.png) [good](https://example.org)

| a | b |
|---|---|
| 1 | 2 |
"""


def test_page_shows_the_adapter_and_obeys_nothing_in_it(url: str, repo: str) -> None:
    api = HfApi(endpoint=url, token=ALICE)
    api.create_commit(
        repo,
        [CommitOperationAdd("README.md", HOSTILE.encode()), CommitOperationAdd("a&b.txt", b"x")],
        commit_message="<b>bold</b>",
    )
    page = get_session().get(f"{url}/{repo}")
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    text = page.text
    for hostile in ("<script", "<img", 'href="javascript', "<b>bold"):
        assert hostile not in text.lower()
    for shown in ("<h1>Poems &lt;script&gt;", 'href="https://example.org"', "<td>1</td>", "org/base", "a&amp;b.txt"):
        assert shown in text
    assert "&lt;b&gt;bold" in text
    sha = api.model_info(repo).sha
    assert f'href="/{repo}/resolve/{sha}/a%26b.txt"' in text
    older = get_session().get(f"{url}/{repo}", params={"revision": api.list_repo_commits(repo)[1].commit_id})
    assert "Poems" not in older.text


def test_list_page_finds_by_name_and_base(url: str, repo: str) -> None:
    HfApi(endpoint=url, token=ALICE).upload_file(
        path_or_fileobj=b"---\nbase_model: org/other\n---\n", path_in_repo="README.md", repo_id=repo
    )
    for query, is_there in (("", True), ("?search=list_page", True), ("?base=org/other", True), ("?base=org/x", False)):
        page = get_session().get(f"{url}/{query}", headers={"Accept": "text/html"})
        assert (f'href="/{repo}"' in page.text) == is_there


@pytest.mark.parametrize("path", ["README.md", "adapter_config.json", ".gitignore"])
def test_description_that_came_as_a_large_object_and_is_gone_breaks_no_list(
    url: str, root: Path, repo: str, path: str
) -> None:
    store, repo_id = HubStore(root), RepoId.parse(repo)
    entry = store.lfs_entry(repo_id, sha256 := upload(store, path.encode(), repo_id))
    store.commit(repo_id, "main", changes=[PutFile(path, entry)], new=NewCommit("alice", path))
    store.drop_lfs(repo_id, sha256)
    store.objects.lfs_path(sha256).unlink()
    api = HfApi(endpoint=url, token=ALICE)
    assert repo in [model.id for model in api.list_models()]
    assert path in (api.list_repo_files(repo))
    for page in ("/", f"/{repo}"):
        assert get_session().get(url + page, headers={"Accept": "text/html"}).status_code == 200
    body = {"files": [{"path": "w", "size": 1, "sample": ""}]}
    assert ask(url, "POST", f"/api/models/{repo}/preupload/main", json=body).status_code == 200


def test_private_repository_has_no_page(url: str, repo: str) -> None:
    HfApi(endpoint=url, token=ALICE).update_repo_settings(repo, private=True)
    assert get_session().get(f"{url}/{repo}").status_code == 401
    assert repo not in get_session().get(url, headers={"Accept": "text/html"}).text
