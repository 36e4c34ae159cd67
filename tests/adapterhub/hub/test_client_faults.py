"""Push and pull while the Hub is busy, failing, gated, or a mirror: a proxy before our own server misbehaves."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import httpx
import pytest
from hub_fixtures import ALICE, BOB, LFS_UPLOADS_WARN, PEOPLE, start_hub
from huggingface_hub import HfApi
from packages import write_manifest, write_package

from adapterhub.adapter import AdapterRef
from adapterhub.errors import Conflict, DigestMismatch, HubError, HubUnavailable, NotAuthorized, SignatureInvalid
from adapterhub.hub import client as hub_module
from adapterhub.hub.client import Hub
from adapterhub.hub.mirror import mirror
from adapterhub.hubserver.storage.quotas import Limits
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        yield url


@pytest.fixture(scope="module")
def other_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_hub(tmp_path_factory.mktemp("other"), PEOPLE) as url:
        yield url


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    return f"alice/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_PAUSES_S", (0.01, 0.01, 0.01))


@dataclass
class Moody:
    """A proxy: answers `status` so many times to requests whose `METHOD path` holds `where`, else passes them on.

    With `cut_at` the refusal is a connection that ends after so many bytes of the answer instead, `how` it does.
    """

    behind: str
    where: str
    status: int
    times: int
    headers: dict[str, str] = field(default_factory=dict)
    rewrites: tuple[bytes, bytes] = (b"", b"")
    """what stands in an answer for what the Hub said"""
    cut_at: int | None = None
    how: Literal["closed", "reset"] = "closed"
    refused: int = 0
    ranges: list[str | None] = field(default_factory=list)
    """what was asked for where it refuses or refused"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def refuses(self, line: str) -> bool:
        with self.lock:
            if self.where not in line or self.refused >= self.times:
                return False
            self.refused += 1
            return True


@contextlib.contextmanager
def proxied(mood: Moody) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            line = f"{self.command} {self.path}"
            if mood.where in line and self.command != "HEAD":
                mood.ranges.append(self.headers["Range"])
            is_refused = (mood.cut_at is None or self.command != "HEAD") and mood.refuses(line)
            if is_refused and mood.cut_at is None:
                self.send_response(mood.status)
                for key, value in mood.headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
            answer = httpx.request(
                self.command, mood.behind + self.path, headers={**headers, "Accept-Encoding": "identity"}, content=body
            )
            self.send_response(answer.status_code)
            for key, value in answer.headers.items():
                if key.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(key, value.replace(mood.behind, f"http://{self.headers['Host']}"))
            content = answer.content.replace(*mood.rewrites) if mood.rewrites[0] else answer.content
            length = answer.headers.get("content-length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if is_refused:
                self.wfile.write(content[: mood.cut_at])
                self.close_connection = True
                if mood.how == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
            elif self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _pass

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_pull_waits_for_a_hub_that_is_busy_or_failing(url: str, repo: str, tmp_path: Path, status: int) -> None:
    pushed = open_adapter(write_package(tmp_path / "p"))
    Hub(url, ALICE).push(pushed, repo)
    mood = Moody(url, f"/api/models/{repo}", status, 2, {"Retry-After": "0"})
    with proxied(mood) as moody:
        assert Hub(moody, ALICE).pull(repo, tmp_path / "x")[0].digest == pushed.digest
    assert mood.refused == 2


def test_a_hub_that_stays_busy_is_unavailable(url: str, repo: str, tmp_path: Path) -> None:
    with proxied(Moody(url, "/api/models/", 503, 99)) as moody, pytest.raises(HubUnavailable, match="status 503"):
        Hub(moody, ALICE).pull(repo, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_commit_is_sent_again_when_told_to_wait_and_not_after_a_failure(url: str, repo: str, tmp_path: Path) -> None:
    adapter = open_adapter(write_package(tmp_path / "p"))
    with proxied(Moody(url, "POST /api/models/" + repo + "/commit", 429, 1, {"Retry-After": "0"})) as moody:
        Hub(moody, ALICE).push(adapter, repo)
    newer = open_adapter(write_package(tmp_path / "q", seed=1))
    failing = Moody(url, "POST /api/models/" + repo + "/commit", 500, 99)
    with proxied(failing) as moody, pytest.raises(HubUnavailable):
        Hub(moody, ALICE).push(newer, repo)
    assert failing.refused == 1
    assert len(HfApi(endpoint=url, token=ALICE).list_repo_commits(repo)) == 2


def test_a_gated_adapter_says_where_to_ask_before_a_download(url: str, repo: str, tmp_path: Path) -> None:
    """Gated as the public Hub gates: everybody sees the page, the files are for those who asked."""
    Hub(url, ALICE).push(open_adapter(write_package(tmp_path / "p")), repo)
    mood = Moody(url, "/auth-check", 403, 1, {"X-Error-Code": "GatedRepo"}, (b'"gated":false', b'"gated":"manual"'))
    with proxied(mood) as moody, pytest.raises(NotAuthorized, match=f"access is gated: ask for it at {moody}/{repo}"):
        Hub(moody, BOB).pull(repo, tmp_path / "x")
    assert mood.refused == 1
    assert not (tmp_path / "x").exists()


def test_a_proposal_is_a_pull_request_and_leaves_main(url: str, repo: str, tmp_path: Path) -> None:
    hub = Hub(url, ALICE)
    commit = hub.push(open_adapter(write_package(tmp_path / "p")), repo)
    better = open_adapter(write_package(tmp_path / "q", seed=1))
    request = hub.propose(better, repo)
    assert request.startswith(f"{url}/{repo}/discussions/")
    assert hub.commit_of(repo) == commit
    number = request.rpartition("/")[2]
    assert hub.pull(repo, tmp_path / "x", revision=f"refs/pr/{number}")[0].digest == better.digest


def test_of_two_pushes_racing_exactly_one_wins(url: str, repo: str, tmp_path: Path) -> None:
    hub = Hub(url, ALICE)
    hub.push(open_adapter(write_package(tmp_path / "first")), repo)
    adapters = [open_adapter(write_package(tmp_path / f"p{n}", seed=n + 1)) for n in range(2)]
    gate = threading.Barrier(2)
    outcomes: list[str] = []

    def race(number: int) -> None:
        own = Hub(url, ALICE)
        api = own._api
        found = api.model_info(repo)

        def seen_together(*args: object, **options: object) -> object:
            gate.wait()
            return found

        api.model_info = seen_together  # type: ignore[method-assign, assignment]
        try:
            own.push(adapters[number], repo)
            outcomes.append(adapters[number].digest)
        except Conflict as error:
            assert "changed meanwhile" in str(error)
            outcomes.append("conflict")

    threads = [threading.Thread(target=race, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[0] == "conflict"
    winner = next(one for one in outcomes if one != "conflict")
    assert hub.pull(repo, tmp_path / "x")[0].digest == winner


def test_a_mirror_has_the_same_adapters_in_the_same_order(url: str, other_url: str, repo: str, tmp_path: Path) -> None:
    source, target = Hub(url, ALICE), Hub(other_url, ALICE)
    adapters = [open_adapter(write_package(tmp_path / f"p{n}", seed=n)) for n in range(3)]
    for adapter in adapters[:2]:
        source.push(adapter, repo, message=f"seed {adapter.digest[7:12]}")
    assert len(mirror(repo, source, target)) == 2
    source.push(adapters[2], repo)
    made = mirror(repo, source, target)
    assert len(made) == 1  # resumes where it stopped
    assert mirror(repo, source, target) == []
    there = [commit for commit in target.commits(repo) if "mirrored from" in commit.message]
    pulled = [target.pull(repo, tmp_path / f"x{n}", revision=c.id)[0].digest for n, c in enumerate(there)]
    assert pulled == [adapter.digest for adapter in adapters]
    assert there[0].title == f"seed {adapters[0].digest[7:12]}"
    with pytest.raises(Conflict, match="is not a mirror of"):
        mirror(repo, target, source)
    third = f"{repo}-again"
    for seed in range(2):  # a mirror of a mirror continues, too
        assert len(mirror(repo, target, source, name=third)) == (3, 0)[seed]


def test_a_read_mirror_with_little_more_than_files_is_enough(url: str, repo: str, tmp_path: Path) -> None:
    """Every route but the model's own page and its files is refused."""
    pushed = open_adapter(write_package(tmp_path / "p"))
    Hub(url, ALICE).push(pushed, repo)
    for route in ("/auth-check", "/tree/", "/paths-info/", "/refs", "/commits/"):
        with proxied(Moody(url, route, 404, 99)) as moody:
            assert Hub(moody).pull(repo, tmp_path / route.strip("/"))[0].digest == pushed.digest
    assert httpx.head(f"{url}/api/models/{repo}").status_code == 200


def test_a_policy_refuses_at_pull_what_is_not_signed(url: str, repo: str, tmp_path: Path) -> None:
    hub = Hub(url, ALICE)
    hub.push(open_adapter(write_package(tmp_path / "p")), repo)
    registry = Registry(tmp_path / "home", hub)
    registry.root.mkdir()
    (registry.root / "policy.toml").write_text('[[trust]]\nnames = "alice/*"\nkeys = []\n')
    with pytest.raises(SignatureInvalid):
        registry.pull(AdapterRef.parse(repo), hub)
    assert registry.list() == []
    assert [path.name for path in registry.root.iterdir() if not path.name.startswith(".")] == ["policy.toml"]


def test_a_lock_is_fetched_by_commit_and_held_to_its_digest(url: str, repo: str, tmp_path: Path) -> None:
    hub = Hub(url, ALICE)
    first = open_adapter(write_package(tmp_path / "p"))
    hub.push(first, repo)
    here = Registry(tmp_path / "here", hub)
    here.resolve(AdapterRef.parse(repo))
    locked = here.lock({"x": AdapterRef.parse(repo)}).adapters["x"]
    hub.push(open_adapter(write_package(tmp_path / "q", seed=1)), repo)
    there = Registry(tmp_path / "there")
    assert there.resolve(there.obtain(locked, hub)).digest == first.digest
    other = json.loads(locked.model_dump_json()) | {"digest": "sha256:" + "0" * 64}
    with pytest.raises(DigestMismatch, match="expected sha256:000"):
        Registry(tmp_path / "third").obtain(type(locked).model_validate(other), hub)


def _large_package(folder: Path, size_bytes: int) -> Path:
    (write_package(folder) / "tokenizer.json").write_text(json.dumps({"padding": "x" * size_bytes}))
    write_manifest(folder)
    return folder


@LFS_UPLOADS_WARN
@pytest.mark.parametrize(("how", "asked"), [("closed", [None, "bytes=10485760-"]), ("reset", [None, None])])
def test_a_connection_cut_within_a_large_file_resumes_in_the_same_pull(
    url: str, repo: str, tmp_path: Path, how: Literal["closed", "reset"], asked: list[str | None]
) -> None:
    """The client keeps 10 MiB at a time of what came, and nothing once the connection was reset."""
    pushed = open_adapter(_large_package(tmp_path / "p", 12 << 20))
    Hub(url, ALICE).push(pushed, repo)
    mood = Moody(url, "/tokenizer.json", 0, 1, cut_at=11 << 20, how=how)
    with proxied(mood) as moody:
        assert Hub(moody, ALICE).pull(repo, tmp_path / "x")[0].digest == pushed.digest
    assert mood.refused == 1
    assert mood.ranges == asked


@LFS_UPLOADS_WARN
@pytest.mark.parametrize(("status", "error"), [(403, NotAuthorized), (507, HubUnavailable)])
def test_a_large_file_refused_while_it_is_sent_is_an_error_of_the_hub(
    url: str, repo: str, tmp_path: Path, status: int, error: type[HubError]
) -> None:
    mood = Moody(url, "PUT /", status, 99)
    with proxied(mood) as moody, pytest.raises(error, match=f"cannot push to {repo}"):
        mood.rewrites = (url.encode(), moody.encode())  # the addresses the Hub gives for uploads
        Hub(moody, ALICE).push(open_adapter(_large_package(tmp_path / "p", 11 << 20)), repo)
    assert mood.refused


def test_a_large_file_beyond_the_quota_is_refused_in_the_words_of_the_hub(tmp_path: Path) -> None:
    large = open_adapter(_large_package(tmp_path / "p", 11 << 20))
    (tmp_path / "hub").mkdir()
    with (
        start_hub(tmp_path / "hub", PEOPLE, Limits(repo_bytes=1 << 20)) as url,
        pytest.raises(HubError, match="cannot push to alice/large: .* refused .* do not fit"),
    ):
        Hub(url, ALICE).push(large, "alice/large")


_PULL_UNTIL_THERE_IS_ROOM = """
import json, sys
from pathlib import Path
from adapterhub.adapter import AdapterRef
from adapterhub.errors import StorageFull
from adapterhub.hub.client import Hub
from adapterhub.registry.registry import Registry

repo, hub, disk = AdapterRef.parse(sys.argv[2]), Hub(sys.argv[1]), Path(sys.argv[3])
registry, filler = Registry(disk / "home"), disk / "filler"
room, refused = 0, []
while True:
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            file.truncate(file.tell() - room)
    try:
        registry.pull(repo, hub)
    except StorageFull as error:
        paths = [path for path in registry.root.rglob("*") if path.is_file() or path.name.startswith(".")]
        refused.append([str(error), [path.name for path in paths], registry.store.digests(), registry.log.names()])
        room = room + 4096 if room else 1 << 20
    else:
        break
print(json.dumps([refused, registry.resolve(repo).digest]))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_a_disk_that_fills_during_a_pull_keeps_nothing_of_it(url: str, repo: str, tmp_path: Path) -> None:
    """A RAM disk of 4 MiB in a mount namespace of its own: full, then with a page more room at each try."""
    pushed = open_adapter(_large_package(tmp_path / "p", 1 << 20))
    Hub(url, ALICE).push(pushed, repo)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=4m tmpfs {disk} && exec "$@"'
    pulls = [sys.executable, "-c", _PULL_UNTIL_THERE_IS_ROOM, url, repo, str(disk)]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *pulls]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(f"no small disk can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    refused, digest = json.loads(done.stdout)
    assert len(refused) > 2
    for said, left, digests, names in refused:
        assert "the disk is full" in said
        assert (left, digests, names) == ([], [], [])
    assert digest == pushed.digest
