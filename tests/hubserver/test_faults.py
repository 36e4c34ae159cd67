"""Faults: a hub that is killed at any moment, and a full disk: no confirmed data is lost, no partial data is visible.

`make soak` runs the first for minutes (ADAPTERHUB_SOAK_S) instead of a few rounds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_fixtures import ALICE, PEOPLE, hub_command, spawn_hub, wait_until_ready

from adapterhub.hubserver.garbage_collection import GarbageCollector
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.quotas import Limits
from adapterhub.hubserver.storage.store import HubStore

REPO = "alice/poems"
ROUNDS = 4
SOAK_S = float(os.environ.get("ADAPTERHUB_SOAK_S", "0"))


def ask(url: str, method: str, path: str, **options: Any) -> httpx.Response:
    return httpx.request(method, f"{url}{path}", headers={"Authorization": f"Bearer {ALICE}"}, timeout=20, **options)


def upload(url: str, data: bytes) -> httpx.Response:
    body = {"operation": "upload", "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}]}
    (answer,) = ask(url, "POST", f"/{REPO}.git/info/lfs/objects/batch", json=body).json()["objects"]
    return httpx.put(answer["actions"]["upload"]["href"], content=data, timeout=20)


def commit(url: str, number: int, sha256: str, query: str = "") -> httpx.Response:
    lines = [
        {"key": "header", "value": {"summary": str(number)}},
        {"key": "file", "value": {"path": "number.txt", "content": str(number)}},
        {"key": "lfsFile", "value": {"path": "w", "oid": sha256}},
    ]
    return ask(url, "POST", f"/api/models/{REPO}/commit/main{query}", content="\n".join(map(json.dumps, lines)))


def merged(url: str, number: int, sha256: str) -> Iterator[httpx.Response]:
    """The same as `commit` by a pull request; the last answer names the commit."""
    yield (opened := commit(url, number, sha256, "?create_pr=1"))
    pull = str(opened.json()["pullRequestUrl"]).rpartition("/")[2]
    yield ask(url, "POST", f"/api/models/{REPO}/discussions/{pull}/merge")
    yield ask(url, "GET", f"/api/models/{REPO}/discussions/{pull}")


class Pusher(threading.Thread):
    """Pushes one version after the other until the hub is gone; remembers what the hub has promised."""

    def __init__(self, url: str, promised: dict[int, tuple[str, str]], copies: list[str] | None = None) -> None:
        super().__init__()
        self._url, self._promised = url, promised
        self._copies = copies
        self.faults: list[str] = []
        self.has_promised = threading.Event()

    def run(self) -> None:
        try:
            while True:
                number = max(self._promised, default=-1) + 1
                weights = os.urandom(random.randint(1, 300_000))
                for reply in self._push(number, weights):
                    if reply.status_code != 200:
                        self.faults.append(reply.text)
                        return
                    last = reply.json()
                sha = last["commitOid"] if "commitOid" in last else last["changes"]["mergeCommitId"]
                self._promised[number] = (sha, sha_of(weights))
                self.has_promised.set()
                if self._copies is not None and number % 3 == 0:
                    name = f"alice/copy-{number}-{os.urandom(4).hex()}"
                    if ask(self._url, "POST", f"/api/models/{REPO}/duplicate", json={"repository": name}).is_success:
                        self._copies.append(name)
        except httpx.TransportError:
            return

    def _push(self, number: int, weights: bytes) -> Iterator[httpx.Response]:
        """Yield the answers to a push: by one commit, or every other time by a pull request."""
        yield upload(self._url, weights)
        if number % 2 or self._copies is None:
            yield commit(self._url, number, sha_of(weights))
        else:
            yield from merged(self._url, number, sha_of(weights))


def sha_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_folder(root: Path, promised: dict[int, tuple[str, str]], copies: list[str] | None = None) -> None:
    """Every promised version and copy is there, and every version of every repository that is visible is whole."""
    store = HubStore(root)
    for repo in store.repos("model"):
        for found in store.history(repo, "main"):
            for entry in found.files.values():
                data = store.path_of(entry).read_bytes()
                assert (len(data), entry.sha256 in (None, sha_of(data))) == (entry.size, True)
            if found.files:
                assert store.path_of(found.files["number.txt"]).read_text() == found.title.partition(" ")[0]
                assert store.can_read(repo.repo_id, found.files["w"])
    history = {commit.sha: commit for commit in store.history(store.repo(RepoId.parse(REPO)), "main")}
    assert {sha for sha, _ in promised.values()} <= set(history)
    for sha, sha256 in promised.values():
        assert history[sha].files["w"].sha256 == sha256
    for name in copies or ():
        assert {one.sha for one in store.history(store.repo(RepoId.parse(name)), "main")} <= set(history)


def test_killed_hub_loses_nothing_it_promised(tmp_path: Path) -> None:
    seed = time.time_ns()
    print("seed", seed)
    chance = random.Random(seed)
    promised: dict[int, tuple[str, str]] = {}
    copies: list[str] = []
    end = time.monotonic() + SOAK_S
    rounds = 0
    while rounds < ROUNDS or time.monotonic() < end:
        with spawn_hub(tmp_path, PEOPLE) as hub:
            url = wait_until_ready(hub)
            if rounds == 0:
                ask(url, "POST", "/api/repos/create", json={"name": "poems", "organization": "alice"})
            pusher = Pusher(url, promised, copies)
            pusher.start()
            # At least one version a round, or nothing is put at risk.
            assert pusher.has_promised.wait(30)
            time.sleep(chance.uniform(0, 0.4))
            hub.kill()
            hub.wait()
            pusher.join()
        assert pusher.faults == []
        check_folder(tmp_path, promised, copies)
        rounds += 1
        # A version may be there that was never promised: the answer was lost. The next continues from what is there.
        store = HubStore(tmp_path)
        head = store.commit_at(store.repo(RepoId.parse(REPO)), "main")
        number = head.title.partition(" ")[0]
        if number.isdecimal() and int(number) not in promised:
            promised[int(number)] = (head.sha, str(head.files["w"].sha256))
        # The check reads every copy: those of earlier rounds were checked.
        for name in copies[:-2]:
            store.delete_repo(RepoId.parse(name))
        del copies[:-2]
    assert promised
    print(f"{rounds} kills, {len(promised)} versions")


def test_gc_beside_pushes_takes_nothing_that_is_needed(tmp_path: Path) -> None:
    promised: dict[int, tuple[str, str]] = {}
    with spawn_hub(tmp_path, PEOPLE) as hub:
        url = wait_until_ready(hub)
        ask(url, "POST", "/api/repos/create", json={"name": "poems", "organization": "alice"})
        assert upload(url, b"never committed").status_code == 200
        pusher = Pusher(url, promised)
        pusher.start()
        removed, start = 0, time.monotonic()
        # Until the first object is older than the grace period, and some pushes have ended meanwhile.
        while not (removed and len(promised) > 1) and time.monotonic() - start < 30:
            removed += GarbageCollector(tmp_path, grace_s=3).gc().num_objects
        hub.kill()
        hub.wait()
        pusher.join()
    assert (pusher.faults, removed) == ([], 1)
    assert len(promised) > 1
    check_folder(tmp_path, promised)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_full_disk_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    arguments = hub_command(tmp_path, PEOPLE, Limits(free_bytes=0))
    mount = f'mount -t tmpfs -o size=4m tmpfs {tmp_path} && cat > {tmp_path}/tokens.json && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *arguments]
    tokens = (tmp_path / "tokens.json").open()
    with tokens, subprocess.Popen(command, stdin=tokens, stderr=subprocess.PIPE, text=True) as hub:
        try:
            url = wait_until_ready(hub)
        except RuntimeError as error:
            if "unshare" in str(error) or "mount" in str(error):
                pytest.skip(f"no small disk can be mounted here: {error}")
            raise
        try:
            ask(url, "POST", "/api/repos/create", json={"name": "poems", "organization": "alice"})
            # What the quota does not see coming: two at once, each of which is within it.
            big = os.urandom(5 << 20)
            body = {"operation": "upload", "objects": [{"oid": sha_of(big), "size": len(big)}]}
            (answer,) = ask(url, "POST", f"/{REPO}.git/info/lfs/objects/batch", json=body).json()["objects"]
            assert (answer["error"]["code"], "hub gc" in answer["error"]["message"]) == (507, True)
            halves = [os.urandom(2_300_000) for _ in range(2)]
            batches = [{**body, "objects": [{"oid": sha_of(half), "size": len(half)}]} for half in halves]
            answers = [
                ask(url, "POST", f"/{REPO}.git/info/lfs/objects/batch", json=one).json()["objects"][0]
                for one in batches
            ]
            addresses = [answer["actions"]["upload"]["href"] for answer in answers]
            spools = Path(f"/proc/{hub.pid}/root{tmp_path}/uploads")
            replies: list[httpx.Response] = []

            def first_meanwhile() -> Iterator[bytes]:
                # Until the second is taken in; the questions pass the time.
                assert any(ask(url, "GET", f"/api/models/{REPO}") and any(spools.iterdir()) for _ in range(1000))
                replies.append(httpx.put(addresses[0], content=halves[0], timeout=20))
                yield halves[1]

            replies.append(httpx.put(addresses[1], content=first_meanwhile(), timeout=20))
            assert [reply.status_code for reply in replies] == [200, 507]
            assert "disk is full" in replies[1].json()["error"]
            assert commit(url, 0, sha_of(halves[0])).status_code == 200
            got = ask(url, "GET", f"/{REPO}/resolve/main/w")
            assert got.content == halves[0]
        finally:
            hub.terminate()
            hub.wait()
