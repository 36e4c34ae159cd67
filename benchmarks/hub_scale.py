"""Measure our Hub with many repositories and with one of many files: times of listing and commits, memory and disk.

Asks over HTTP, so that it runs against any version of the server (on PYTHONPATH).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

_SERVE = "import sys; from pathlib import Path; from adapterhub.hubserver.server import serve_hub; "
_SERVE += "serve_hub(Path(sys.argv[1]), port=0)"
CARD = "---\nbase_model: org/base-{0}\ntags: [adapterhub]\n---\n# Adapter {0}\n"
FILES_PER_COMMIT = 10_000
COMMITS_LISTED = 256


class Server:
    """A Hub server as a child process, and requests to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        command = [sys.executable, "-c", _SERVE, str(root)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        url = self.process.stderr.readline().split()[3]
        token = (root / "token").read_text()
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=600)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        reply = self._client.request(method, path, **options)
        reply.raise_for_status()
        return reply

    def create(self, name: str) -> None:
        self.ask("POST", "/api/repos/create", json={"name": name, "organization": "me"})

    def commit(self, repo: str, files: Iterable[tuple[str, str]]) -> None:
        lines = [{"key": "header", "value": {"summary": "files"}}]
        lines += [{"key": "file", "value": {"path": path, "content": text}} for path, text in files]
        self.ask("POST", f"/api/models/{repo}/commit/main", content="\n".join(map(json.dumps, lines)))

    def seconds(self, method: str, path: str, rounds: int = 5) -> tuple[float, float]:
        """Return the time of the first answer, and the median of later ones."""
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            self.ask(method, path)
            times.append(time.perf_counter() - start)
        return times[0], statistics.median(times[1:])

    def memory(self) -> str:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return ", ".join(f"{name} {int(status[name].split()[0]) / 1024:.0f} MiB" for name in ("VmRSS", "VmHWM"))

    def restart(self) -> Server:
        self.stop()
        return Server(self.root)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def disk_bytes(root: Path) -> int:
    """Bytes below the folder of repositories: records, without the files' contents."""
    return sum(path.stat().st_size for path in (root / "repos").rglob("*") if path.is_file())


def told(name: str, first: float, later: float) -> None:
    print(f"{name:44} first {first * 1000:8.0f} ms   then {later * 1000:8.0f} ms")


def many_repositories(server: Server, count: int) -> Server:
    start = time.perf_counter()
    for number in range(count):
        server.create(f"adapter-{number}")
        server.commit(f"me/adapter-{number}", [("README.md", CARD.format(number)), ("adapter_config.json", "{}")])
    print(f"{count} repositories made: {(time.perf_counter() - start) / count * 1000:.1f} ms each")
    server = server.restart()
    print("memory at the start:", server.memory())
    told("list, one page of 1,000", *server.seconds("GET", "/api/models?filter=adapterhub&limit=1000"))
    told("list, first page of 100", *server.seconds("GET", "/api/models?filter=adapterhub&limit=100"))
    told("search by name", *server.seconds("GET", f"/api/models?search=adapter-{count // 2}"))
    told("filter by base", *server.seconds("GET", "/api/models?filter=base_model:adapter:org/base-7"))
    told("describe one", *server.seconds("GET", "/api/models/me/adapter-7"))
    print("memory after:", server.memory())
    return server


def many_files(server: Server, count: int) -> Server:
    repo = "me/large"
    server.create("large")
    start = time.perf_counter()
    for first in range(0, count, FILES_PER_COMMIT):
        numbers = range(first, min(first + FILES_PER_COMMIT, count))
        server.commit(repo, ((f"data/part-{number:06}.json", f"{number}") for number in numbers))
    print(f"{count} files committed: {(time.perf_counter() - start) / count * 1000:.2f} ms each")
    server = server.restart()
    before = disk_bytes(server.root)
    times = []
    for number in range(COMMITS_LISTED):
        start = time.perf_counter()
        server.commit(repo, [("data/part-000500.json", f"changed {number}")])
        times.append(time.perf_counter() - start)
    grown = (disk_bytes(server.root) - before) / COMMITS_LISTED
    print(f"commit of one byte: {statistics.median(times) * 1000:.0f} ms, {grown / 1000:.0f} kB of disk")
    print("memory after these commits:", server.memory())
    server = server.restart()
    told(
        f"list {COMMITS_LISTED} commits",
        *server.seconds("GET", f"/api/models/{repo}/commits/main?limit={COMMITS_LISTED}"),
    )
    print("memory after listing them:", server.memory())
    told("list all files", *server.seconds("GET", f"/api/models/{repo}/tree/main?recursive=true", rounds=3))
    told("describe, with the names of its files", *server.seconds("GET", f"/api/models/{repo}", rounds=3))
    told("download one file", *server.seconds("GET", f"/{repo}/resolve/main/data/part-000777.json"))
    print("memory after:", server.memory())
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repositories", type=int, default=1000)
    parser.add_argument("--files", type=int, default=100_000)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    for count, measure in ((options.repositories, many_repositories), (options.files, many_files)):
        with tempfile.TemporaryDirectory(prefix="hub-scale-") as folder:
            if count:
                measure(Server(Path(folder)), count).stop()


if __name__ == "__main__":
    main()
