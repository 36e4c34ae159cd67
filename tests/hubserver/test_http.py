"""Requests that the client library hides or never sends: headers, ranges, hostile names, forged uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hub_fixtures import ALICE, BOB, PEOPLE, READER, start_hub
from hub_fixtures import upload as store_object
from huggingface_hub import get_session
from starlette.testclient import TestClient

from adapterhub.hubserver.app import create_hub_app
from adapterhub.hubserver.auth.tickets import Signer, UploadTicket
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.git_ids import lfs_pointer
from adapterhub.hubserver.storage.store import HubStore

REPO = "alice/poems"
WEIGHTS = b"weights" * 10
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
HEADER = {"key": "header", "value": {"summary": "a change"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with start_hub(root, PEOPLE) as url:
        ask(url, "POST", "/api/repos/create", json={"name": "poems", "organization": "alice"})
        yield url


@pytest.fixture(scope="module")
def filled(url: str) -> str:
    """The address of a repository with a small file and an LFS file."""
    assert upload(url, WEIGHTS).status_code == 200
    lines = [HEADER, file_line("digits.txt", b"0123456789"), lfs_line("w.safetensors")]
    assert commit(url, *lines).status_code == 200
    return f"{url}/{REPO}/resolve/main"


def ask(url: str, method: str, path: str, token: str | None = ALICE, **options: Any) -> Any:
    headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    return get_session().request(method, f"{url}{path}", headers=headers, **options)


def commit(url: str, *lines: dict[str, Any], query: str = "") -> Any:
    return commit_bytes(url, b"\n".join(json.dumps(line).encode() for line in lines), query)


def commit_bytes(url: str, body: bytes, query: str = "") -> Any:
    return ask(url, "POST", f"/api/models/{REPO}/commit/main{query}", content=body)


def file_line(path: str, data: bytes) -> dict[str, Any]:
    return {
        "key": "file",
        "value": {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"},
    }


def lfs_line(path: str, oid: str = SHA256, **more: Any) -> dict[str, Any]:
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, **more}}


def batch(url: str, oid: str, *, size: int) -> Any:
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
    reply = ask(url, "POST", f"/{REPO}.git/info/lfs/objects/batch", json=body)
    assert reply.status_code == 200
    return reply.json()["objects"][0]


def upload(url: str, data: bytes, announced: bytes | None = None) -> Any:
    announced = data if announced is None else announced
    answer = batch(url, hashlib.sha256(announced).hexdigest(), size=len(announced))
    return get_session().put(answer["actions"]["upload"]["href"], content=data)


# Plain pages


def test_health_and_identity(url: str) -> None:
    assert ask(url, "GET", "/health", token=None).json() == {"status": "ok"}
    assert ask(url, "GET", "/", token=None).json()["server"] == "adapterhub"


@pytest.mark.parametrize("path", ["/api/agent-harnesses", "/api/nothing/here", "/api/models/a/b/c/d", "/nothing"])
def test_unknown_address_is_not_found(url: str, path: str) -> None:
    assert ask(url, "GET", path).status_code == 404


@pytest.mark.parametrize("digits", [10, 400, 5000])
def test_huge_number_in_an_address_names_nothing(url: str, digits: int) -> None:
    number, repo = "9" * digits, f"/api/models/{REPO}"
    pull = f"refs%2Fpr%2F{number}"
    for path in (f"{repo}/discussions/{number}", f"{repo}/revision/{pull}", f"{repo}/tree/{pull}"):
        assert ask(url, "GET", path).status_code == 404
    assert ask(url, "POST", f"{repo}/discussions/{number}/merge").status_code == 404
    assert ask(url, "POST", f"{repo}/commit/{pull}", content=json.dumps(HEADER)).status_code == 404
    for path in (f"{repo}/commits/main", f"{repo}/discussions"):
        assert ask(url, "GET", f"{path}?p={number}").status_code == 400


def test_other_kinds_of_repository_are_not_found(url: str) -> None:
    reply = ask(url, "GET", "/api/spaces/alice/app")
    assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "RepoNotFound")
    assert "no spaces" in reply.headers["X-Error-Message"]


def test_head_of_a_model_has_no_body(url: str) -> None:
    reply = ask(url, "HEAD", f"/api/models/{REPO}")
    assert (reply.status_code, reply.content) == (200, b"")


def test_credentials_of_another_kind_are_refused(url: str) -> None:
    reply = ask(url, "GET", "/api/whoami-v2", token=None, headers={"Authorization": "Basic YTpi"})
    assert (reply.status_code, reply.headers["X-Error-Message"]) == (401, "Invalid credentials in Authorization header")


def test_error_message_is_one_ascii_line(url: str, filled: str) -> None:
    reply = ask(filled, "GET", "/%C3%A9%0Ax")
    assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert reply.headers["X-Error-Message"].startswith("no file ")
    assert len(reply.headers["X-Repo-Commit"]) == 40


def test_large_json_is_refused(url: str) -> None:
    assert ask(url, "POST", "/api/validate-yaml", json={"content": "x" * (9 << 20)}).status_code == 413


def test_request_of_another_shape_is_refused(url: str) -> None:
    reply = ask(url, "POST", "/api/repos/create", json={"nome": "x"})
    assert (reply.status_code, "body.name" in reply.json()["error"]) == (400, True)


# Downloads


def test_download_says_what_it_is(filled: str) -> None:
    small, large = ask(filled, "GET", "/digits.txt"), ask(filled, "HEAD", "/w.safetensors")
    assert small.content == b"0123456789"
    assert small.headers["ETag"] == '"ad471007bd7f5983d273b9584e5629230150fd54"'
    assert "X-Linked-Etag" not in small.headers
    assert (large.headers["Content-Length"], large.content) == (str(len(WEIGHTS)), b"")
    assert large.headers["ETag"] == large.headers["X-Linked-Etag"] == f'"{SHA256}"'
    assert large.headers["X-Linked-Size"] == str(len(WEIGHTS))
    for reply in (small, large):
        assert len(reply.headers["X-Repo-Commit"]) == 40
        assert reply.headers["Accept-Ranges"] == "bytes"
        assert reply.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Content-Type"] == "application/octet-stream"
        assert "X-Xet-Hash" not in reply.headers


@pytest.mark.parametrize(
    ("asked", "got", "where"),
    [("2-4", b"234", "2-4"), ("7-", b"789", "7-9"), ("-2", b"89", "8-9"), ("8-99", b"89", "8-9")],
)
def test_range_gives_the_part(filled: str, asked: str, got: bytes, where: str) -> None:
    reply = ask(filled, "GET", "/digits.txt", headers={"Range": f"bytes={asked}"})
    assert (reply.status_code, reply.content) == (206, got)
    assert reply.headers["Content-Range"] == f"bytes {where}/10"


def test_range_beyond_the_end_is_refused(filled: str) -> None:
    reply = ask(filled, "GET", "/digits.txt", headers={"Range": "bytes=10-"})
    assert (reply.status_code, reply.headers["Content-Range"]) == (416, "bytes */10")


def test_range_of_a_changed_file_gives_all(filled: str) -> None:
    reply = ask(filled, "GET", "/digits.txt", headers={"Range": "bytes=2-4", "If-Range": '"older"'})
    assert (reply.status_code, reply.content) == (200, b"0123456789")


# Hostile names


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../b", ".git/config", "a\\b", "a//b", "a\x00b", ""])
@pytest.mark.parametrize("key", ["file", "lfsFile", "deletedFile"])
def test_commit_of_an_unsafe_path_is_refused(url: str, filled: str, path: str, key: str) -> None:
    lines = {
        "file": file_line(path, b"x"),
        "lfsFile": lfs_line(path),
        "deletedFile": {"key": "deletedFile", "value": {"path": path}},
    }
    reply = commit(url, HEADER, lines[key])
    assert (reply.status_code, "invalid path" in reply.json()["error"]) == (400, True)


def test_preupload_of_an_unsafe_path_is_refused(url: str) -> None:
    body = {"files": [{"path": "../up", "size": 1, "sample": ""}]}
    assert ask(url, "POST", f"/api/models/{REPO}/preupload/main", json=body).status_code == 400


@pytest.mark.parametrize("path", ["/%2e%2e%2f%2e%2e%2frepo.json", "/..%2frepo.json", "/%2Fetc%2Fpasswd"])
def test_download_of_an_unsafe_path_finds_nothing(filled: str, path: str) -> None:
    assert ask(filled, "GET", path).headers["X-Error-Code"] == "EntryNotFound"


@pytest.mark.parametrize("name", ["..%2f../x", "alice/..%2f..%2fobjects", "alice/%00", "a%0Ab/c", "alice/%ff"])
def test_unsafe_repository_name_is_refused(url: str, name: str) -> None:
    assert ask(url, "GET", f"/api/models/{name}").status_code == 400


def test_unsafe_tag_name_is_refused(url: str) -> None:
    reply = ask(url, "POST", f"/api/models/{REPO}/tag/main", json={"tag": "../../x"})
    assert (reply.status_code, "invalid branch or tag name" in reply.json()["error"]) == (400, True)


# Commits


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no header"),
        (b"not json", "cannot be parsed"),
        (b'{"key": "rename", "value": {}}', "cannot be parsed"),
        (b'{"key": "header", "value": {"summary": ""}}', "cannot be parsed"),
        (b'{"key": "header", "value": {"summary": "x", "parentCommit": "main"}}', "cannot be parsed"),
        (b'{"key": "file", "value": {"path": "a", "content": "???", "encoding": "base64"}}', "not base64"),
        (b'{"key": "file", "value": {"path": "a", "content": "\\ud800"}}', "cannot be parsed"),
    ],
)
def test_unreadable_commit_is_refused(url: str, body: bytes, said: str) -> None:
    reply = commit_bytes(url, body)
    assert (reply.status_code, said in reply.json()["error"]) == (400, True)


def test_too_large_a_file_inside_a_commit_is_refused(url: str) -> None:
    reply = commit(url, HEADER, file_line("big", bytes(11 << 20)))
    assert (reply.status_code, "send larger files by LFS" in reply.json()["error"]) == (413, True)


def test_commit_to_a_missing_branch_is_refused(url: str) -> None:
    reply = ask(url, "POST", f"/api/models/{REPO}/commit/nowhere", content=json.dumps(HEADER).encode())
    assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "RevisionNotFound")


def test_lfs_file_nobody_uploaded_is_refused(url: str) -> None:
    reply = commit(url, HEADER, lfs_line("w", "0" * 64))
    assert (reply.status_code, "never uploaded" in reply.json()["error"]) == (400, True)


def test_lfs_file_of_another_size_is_refused(url: str, filled: str) -> None:
    reply = commit(url, HEADER, lfs_line("w", size=1))
    assert (reply.status_code, "announced" in reply.json()["error"]) == (400, True)


def test_text_of_an_lfs_pointer_is_refused_as_a_file(url: str, filled: str) -> None:
    """Its git blob id is that of the LFS file: the two commits would have one id."""
    pointer = lfs_pointer(SHA256, len(WEIGHTS))
    reply = commit(url, HEADER, file_line("w.safetensors", pointer))
    assert (reply.status_code, "is an LFS pointer" in reply.json()["error"]) == (400, True)
    assert ask(filled, "GET", "/w.safetensors").content == WEIGHTS
    assert commit(url, HEADER, file_line("about.txt", b"About: " + pointer)).status_code == 200


def test_commit_of_too_many_changes_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub.hubserver.routes.commits.MAX_CHANGES", 3)
    client = TestClient(create_hub_app(root, PEOPLE), headers={"Authorization": f"Bearer {ALICE}"})
    client.post("/api/repos/create", json={"name": "many", "organization": "alice"})
    for count, status in ((4, 413), (3, 200)):
        lines = [HEADER, *(file_line(f"f{number}", b"x") for number in range(count))]
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        assert client.post("/api/models/alice/many/commit/main", content=body).status_code == status


# Comments, grants and merges


LONG = "x" * 100_001


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("", {"title": "t", "description": LONG}),
        ("/1/comment", {"comment": LONG}),
        ("/1/comment/{event}/edit", {"content": LONG}),
        ("/1/status", {"status": "closed", "comment": LONG}),
        ("/2/merge", {"comment": LONG}),
    ],
)
def test_every_comment_has_the_same_limit(client: TestClient, path: str, body: dict[str, str]) -> None:
    discussions = "/api/models/alice/poems/discussions"
    client.post(discussions, json={"title": "t"})
    client.post(discussions, json={"title": "t", "pullRequest": True})
    event = client.post(f"{discussions}/1/comment", json={"comment": "x"}).json()["newMessage"]["id"]
    address = discussions + path.format(event=event)
    assert client.post(address, json=body).status_code == 400
    shorter = {key: value[:100_000] for key, value in body.items()}
    assert client.post(address, json=shorter).status_code == 200


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    client = TestClient(create_hub_app(tmp_path, PEOPLE), headers={"Authorization": f"Bearer {ALICE}"})
    client.post("/api/repos/create", json={"name": "poems", "organization": "alice"})
    return client


@pytest.mark.parametrize(
    ("path", "body", "who", "status"),
    [
        ("/alice/poems/ask-access", None, BOB, 200),
        ("/api/models/alice/poems/user-access-request/grant", {"user": "bob"}, ALICE, 400),
    ],
)
def test_what_was_granted_meanwhile_stays_granted(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, str] | None, who: str, status: int
) -> None:
    """The request read the repository before the grant; what it writes follows from what is there now."""
    client.put("/api/models/alice/poems/settings", json={"gated": "manual"})
    real = HubStore.set_access

    def granted_before(store: HubStore, repo_id: RepoId, user: str, **options: Any) -> None:
        real(store, repo_id, user, decide=lambda _: "accepted")
        real(store, repo_id, user, **options)

    monkeypatch.setattr(HubStore, "set_access", granted_before)
    assert client.post(path, json=body, headers={"Authorization": f"Bearer {who}"}).status_code == status
    (accepted,) = client.get("/api/models/alice/poems/user-access-request/accepted").json()
    assert accepted["user"]["user"] == "bob"


def test_status_and_its_comment_are_changed_together(client: TestClient) -> None:
    discussions = "/api/models/alice/poems/discussions"
    client.post(discussions, json={"title": "t"})
    client.post(f"{discussions}/1/status", json={"status": "closed", "comment": "done"})
    details = client.get(f"{discussions}/1").json()
    assert [event["type"] for event in details["events"]] == ["comment", "status-change"]
    assert details["status"] == "closed"


def test_merge_of_a_file_that_was_deleted_for_good_is_refused(client: TestClient, tmp_path: Path) -> None:
    store = HubStore(tmp_path)
    repo = RepoId.parse("alice/poems")
    sha256 = store_object(store, b"weights", repo)
    lines = [HEADER, lfs_line("w", sha256), file_line("a", b"a")]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    client.post("/api/models/alice/poems/commit/main?create_pr=1", content=body)
    head = store.repo(repo).branches["main"]
    client.post("/api/models/alice/poems/lfs-files/batch", json={"deletions": {"sha": [sha256]}})
    reply = client.post("/api/models/alice/poems/discussions/1/merge")
    assert (reply.status_code, "permanently deleted" in reply.json()["error"]) == (400, True)
    assert store.repo(repo).branches["main"] == head


# LFS uploads


def test_uploaded_object_is_asked_for_once(url: str, filled: str) -> None:
    assert batch(url, SHA256, size=len(WEIGHTS)) == {"oid": SHA256, "size": len(WEIGHTS)}
    verify = f"/{REPO}.git/info/lfs/verify"
    assert ask(url, "POST", verify, json={"oid": SHA256, "size": len(WEIGHTS)}).status_code == 200
    assert ask(url, "POST", verify, json={"oid": SHA256, "size": 1}).status_code == 400


@pytest.mark.parametrize(("sent", "status"), [(b"tampered", 400), (b"truncat", 400), (b"one byte+", 413)])
def test_tampered_upload_is_refused(url: str, root: Path, sent: bytes, status: int) -> None:
    announced = b"original"
    sha256 = hashlib.sha256(announced).hexdigest()
    reply = upload(url, sent, announced)
    assert (reply.status_code, "announced" in reply.json()["error"]) == (status, True)
    assert "actions" in batch(url, sha256, size=len(announced))
    assert not (root / "objects" / "lfs" / sha256).exists()
    assert list((root / "uploads").iterdir()) == []
    assert commit(url, HEADER, lfs_line("w", sha256)).status_code == 400


@pytest.mark.parametrize(
    ("old", "new"), [("size=8", "size=9"), ("expires=", "expires=1"), ("signature=", "signature=0")]
)
def test_forged_upload_address_is_refused(url: str, old: str, new: str) -> None:
    answer = batch(url, hashlib.sha256(b"original").hexdigest(), size=8)
    href = answer["actions"]["upload"]["href"]
    assert old in href
    reply = get_session().put(href.replace(old, new), content=b"original")
    assert (reply.status_code, "not from this hub" in reply.json()["error"]) == (403, True)


def test_expired_upload_address_is_refused(url: str, root: Path) -> None:
    late = UploadTicket(RepoId.parse(REPO), "0" * 64, size_bytes=1, expires_s=int(time.time()) - 1)
    signature = Signer((root / "upload.secret").read_text()).signature(late)
    query = f"size=1&expires={late.expires_s}&signature={signature}"
    reply = get_session().put(f"{url}/api/uploads/{REPO}/{late.sha256}?{query}", content=b"x")
    assert (reply.status_code, "expired" in reply.json()["error"]) == (403, True)


def test_upload_broken_off_leaves_nothing(url: str, root: Path) -> None:
    href = batch(url, "0" * 64, size=10**7)["actions"]["upload"]["href"]
    address = urlsplit(href)
    head = f"PUT {address.path}?{address.query} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 10000000\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + bytes(4 << 20))
        assert any_within(lambda: any((root / "uploads").iterdir()), url)
    assert any_within(lambda: not any((root / "uploads").iterdir()), url)


def any_within(question: Callable[[], bool], url: str) -> bool:
    """Ask again after each of some hundred answers of the hub, which give it time to notice."""
    return any(question() for _ in range(500) if ask(url, "GET", "/health").status_code == 200)


def test_object_beyond_the_limit_is_refused(url: str) -> None:
    assert batch(url, "0" * 64, size=10**12)["error"]["code"] == 413


def test_upload_is_offered_to_writers_only(url: str) -> None:
    body = {"operation": "upload", "objects": [{"oid": SHA256, "size": 1}]}
    assert ask(url, "POST", f"/{REPO}.git/info/lfs/objects/batch", token=READER, json=body).status_code == 403
