"""A power cut at any moment: what the hub confirmed is on disk, and what is visible is whole.

The two extremes of what a disk may keep; with ADAPTERHUB_SOAK_S (`make soak`) also twenty states between them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_operations import recorded
from hub_fixtures import ALICE, PEOPLE
from starlette.testclient import TestClient

from adapterhub.hubserver.app import create_hub_app
from adapterhub.hubserver.errors import RepoNotFound
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.commit import RepoFile
from adapterhub.hubserver.storage.discussion_store import DiscussionStore
from adapterhub.hubserver.storage.git_ids import blob_id
from adapterhub.hubserver.storage.quotas import Limits
from adapterhub.hubserver.storage.store import HubStore

REPO = RepoId.parse("alice/poems")
API = f"/api/models/{REPO}"
WEIGHTS, PARTS = b"weights", b"weights in parts"
XORB = "0123456789abcdef" * 4
CHUNK = bytes([0, 4, 0, 0, 0, 4, 0, 0]) + b"data"


def sha_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def offer(client: TestClient, data: bytes, *transfers: str) -> dict[str, Any]:
    body = {"operation": "upload", "transfers": transfers, "objects": [{"oid": sha_of(data), "size": len(data)}]}
    (answer,) = client.post(f"/{REPO}.git/info/lfs/objects/batch", json=body).json()["objects"]
    action: dict[str, Any] = answer["actions"]["upload"]
    return action


def commit(client: TestClient, query: str = "", **files: bytes) -> Any:
    def line(path: str, data: bytes) -> dict[str, Any]:
        if data in (WEIGHTS, PARTS):
            return {"key": "lfsFile", "value": {"path": path, "oid": sha_of(data)}}
        return {"key": "file", "value": {"path": path, "content": data.decode()}}

    lines = [{"key": "header", "value": {"summary": "x"}}, *(line(path, data) for path, data in files.items())]
    return client.post(f"{API}/commit/main{query}", content="\n".join(map(json.dumps, lines)))


def create(name: str) -> Callable[[TestClient], Any]:
    body = {"name": name, "organization": "alice"}
    return lambda client: client.post("/api/repos/create", json=body)


def upload_in_parts(client: TestClient) -> Any:
    action = offer(client, PARTS, "multipart")
    client.put(action["header"]["1"], content=PARTS[:10])
    client.put(action["header"]["2"], content=PARTS[10:])
    parts = [{"partNumber": number, "etag": "x"} for number in (1, 2)]
    return client.post(action["href"], json={"oid": sha_of(PARTS), "parts": parts})


def send_xorb(client: TestClient) -> Any:
    token = client.get(f"{API}/xet-write-token/main").json()["accessToken"]
    return client.post(f"/v1/xorbs/default/{XORB}", content=CHUNK, headers={"Authorization": f"Bearer {token}"})


ACTS: list[tuple[str, Callable[[TestClient], Any]]] = [
    ("create", create("poems")),
    ("upload", lambda client: client.put(offer(client, WEIGHTS, "basic")["href"], content=WEIGHTS)),
    ("parts", upload_in_parts),
    ("xorb", send_xorb),
    ("commit", lambda client: commit(client, a=b"a", w=WEIGHTS)),
    ("tag", lambda client: client.post(f"{API}/tag/main", json={"tag": "v1"})),
    ("propose", lambda client: commit(client, "?create_pr=1", b=b"b", p=PARTS)),
    ("comment", lambda client: client.post(f"{API}/discussions/1/comment", json={"comment": "yes"})),
    ("merge", lambda client: client.post(f"{API}/discussions/1/merge")),
    ("duplicate", lambda client: client.post(f"{API}/duplicate", json={"repository": "alice/copy"})),
    ("create other", create("other")),
    ("move", lambda client: client.post("/api/repos/move", json={"fromRepo": "alice/other", "toRepo": "team/other"})),
    ("gate", lambda client: client.put(f"{API}/settings", json={"gated": "manual"})),
    ("grant", lambda client: client.post(f"{API}/user-access-request/grant", json={"user": "bob"})),
    ("delete", lambda client: client.request("DELETE", "/api/repos/delete", json={"name": "copy"})),
    (
        "delete for good",
        lambda client: client.post(
            f"{API}/lfs-files/batch", json={"deletions": {"sha": [sha_of(PARTS)], "rewriteHistory": False}}
        ),
    ),
]


def check_whole(store: HubStore, *, deleted: str | None) -> None:
    """Whatever a ref reaches can be read."""
    for repo in store.repos("model"):
        pulls = [one.head for one in DiscussionStore(store).all(repo) if one.head is not None]
        for start in (*repo.branches.values(), *repo.tags.values(), *pulls):
            for found in store.history(repo, start):
                for entry in found.files.values():
                    if entry.sha256 != deleted:
                        check_entry(store, repo.repo_id, entry)


def check_entry(store: HubStore, repo_id: RepoId, entry: RepoFile) -> None:
    assert store.can_read(repo_id, entry)
    data = store.path_of(entry).read_bytes()
    assert entry.content_id == (blob_id(data) if entry.sha256 is None else sha_of(data))


def check_confirmed(root: Path, store: HubStore, told: list[str]) -> None:
    """What was confirmed is there."""
    if "create" not in told:
        return
    repo = store.repo(REPO)
    files = store.commit_at(repo, "main").files
    marks = set(store.lfs_marks(REPO))
    discussions = DiscussionStore(store)
    facts: dict[str, Callable[[], bool]] = {
        "upload": lambda: sha_of(WEIGHTS) in marks,
        # Its deletion may be on disk before it is confirmed.
        "parts": lambda: sha_of(PARTS) in marks or len(told) >= len(ACTS) - 1,
        "xorb": lambda: (root / "xet" / "alice" / XORB).read_bytes() == CHUNK,
        "commit": lambda: {"a", "w"} <= files.keys(),
        "tag": lambda: {"a", "w"} == store.commit_at(repo, "v1").files.keys(),
        "propose": lambda: {"a", "w", "b", "p"} == store.commit_at(repo, "refs/pr/1").files.keys(),
        "comment": lambda: discussions.get(repo, 1).events[-1].data["text"] == "yes",
        "merge": lambda: {"a", "w", "b", "p"} == files.keys() and discussions.get(repo, 1).status == "merged",
        "gate": lambda: repo.gated == "manual",
        "grant": lambda: repo.access["bob"].status == "accepted",
        "delete for good": lambda: sha_of(PARTS) not in marks,
    }
    for act in told:
        assert act not in facts or facts[act](), f"{act} was confirmed and is lost"
    if "move" in told:
        assert store.repo(RepoId.parse("team/other"))
    if "duplicate" in told and len(told) < len(ACTS) - 2:
        assert store.commit_at(store.repo(RepoId.parse("alice/copy")), "main").files.keys() == {"a", "w", "b", "p"}
    if "delete" in told:
        with pytest.raises(RepoNotFound):
            store.repo(RepoId.parse("alice/copy"))


def test_a_power_cut_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    root = tmp_path / "disk" / "hub"
    with recorded(tmp_path / "disk") as recording:
        app = create_hub_app(root, PEOPLE, limits=Limits(free_bytes=0, part_bytes=10))
        client = TestClient(app, headers={"Authorization": f"Bearer {ALICE}"})
        for name, act in ACTS:
            reply = act(client)
            assert reply.status_code == 200, f"{name}: {reply.text}"
            recording.acknowledge(name)
    recording.check_order()
    draws = 20 if "ADAPTERHUB_SOAK_S" in os.environ else 0
    for told, found in recording.crashes(tmp_path / "after", draws=draws):
        store = HubStore(found / "hub")
        check_confirmed(found / "hub", store, told)
        check_whole(store, deleted=sha_of(PARTS) if len(told) >= len(ACTS) - 1 else None)
