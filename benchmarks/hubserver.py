"""Measure push and pull of one large adapter with our Hub, relative to copying the file and hashing it once.

Also measures the server's peak memory meanwhile, and fifty pulls at once. The client is huggingface_hub, unmodified.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOME = tempfile.mkdtemp(prefix="hub-bench-")
os.environ.update(HF_HOME=f"{HOME}/hf", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

from huggingface_hub import CommitOperationAdd, HfApi, constants  # noqa: E402

from adapterhub.files import sha256_of  # noqa: E402


def seconds(act: object) -> float:
    start = time.perf_counter()
    act()  # type: ignore[operator]
    return time.perf_counter() - start


def copy_and_hash(source: Path) -> float:
    """Copy the file and hash it once, the least that a push or pull does."""
    target = source.with_suffix(".copy")
    taken = seconds(lambda: (shutil.copyfile(source, target), sha256_of(target)))
    target.unlink()
    return taken


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def push(api: HfApi, repo: str, source: Path, *, is_xet: bool) -> float:
    """Push a file whose chunks neither the Hub nor the client has seen."""
    constants.HF_HUB_DISABLE_XET = not is_xet
    operation = CommitOperationAdd("adapter_model.safetensors", source)
    return seconds(lambda: api.create_commit(repo, [operation], commit_message="push"))


def pull(api: HfApi, repo: str, cache: Path) -> float:
    taken = seconds(lambda: api.hf_hub_download(repo, "adapter_model.safetensors", cache_dir=cache))
    shutil.rmtree(cache)
    return taken


def raw_pull(url: str, repo: str) -> float:
    """Download with a client that discards the bytes, which measures the server alone."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    buffer = bytearray(1 << 20)

    def act() -> None:
        connection.request("GET", f"/{repo}/resolve/main/adapter_model.safetensors")
        reply = connection.getresponse()
        while reply.readinto(buffer):
            pass

    return seconds(act)


def raw_push(api: HfApi, repo: str, source: Path) -> float:
    """Upload by LFS with a client that only sends, which measures the server alone."""
    sha256, size = sha256_of(source), source.stat().st_size
    host = api.endpoint.removeprefix("http://")
    connection = http.client.HTTPConnection(host, blocksize=1 << 20)
    body = json.dumps({"operation": "upload", "objects": [{"oid": sha256, "size": size}]})
    headers = {"Authorization": f"Bearer {api.token}", "Content-Type": "application/json"}
    connection.request("POST", f"/{repo}.git/info/lfs/objects/batch", body, headers)
    (answer,) = json.loads(connection.getresponse().read())["objects"]
    address = answer["actions"]["upload"]["href"].removeprefix(api.endpoint)

    def act() -> None:
        with source.open("rb") as file:
            connection.request("PUT", address, file, {"Content-Length": str(size)})
        assert connection.getresponse().status == 200

    return seconds(act)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mb", type=int, default=200)
    options = parser.parse_args()
    folder = Path(HOME)
    root = folder / "hub"
    command = [str(Path(sys.executable).with_name("adapterhub")), "hub", "serve", "--root", str(root), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as hub:
        try:
            assert hub.stderr is not None
            url = hub.stderr.readline().split()[3]
            api = HfApi(endpoint=url, token=(root / "token").read_text())
            rows: dict[str, list[float]] = {"copy + sha256": [], "push, LFS": [], "push, Xet": [], "pull": []}
            rows |= {"LFS upload alone": [], "download alone": []}
            for number in range(options.rounds):
                source = folder / f"weights-{number}"
                source.write_bytes(os.urandom(options.mb << 20))
                rows["copy + sha256"] += [copy_and_hash(source) for _ in range(3)]
                for name, is_xet in (("push, LFS", False), ("push, Xet", True)):
                    repo = api.create_repo(f"local/bench-{number}-{int(is_xet)}").repo_id
                    rows[name].append(push(api, repo, source, is_xet=is_xet))
                    rows["pull"].append(pull(api, repo, folder / "cache"))
                    rows["download alone"].append(raw_pull(url, repo))
                rows["LFS upload alone"].append(raw_push(api, api.create_repo(f"local/raw-{number}").repo_id, source))
                source.unlink()
            base = statistics.median(rows["copy + sha256"])
            for name, times in rows.items():
                taken = statistics.median(times)
                print(f"{name:24} {taken:6.2f} s  {options.mb * 1.048576 / taken:7.0f} MB/s  ratio {base / taken:.2f}")
            print(f"server's peak memory: {peak_mb(hub.pid):.0f} MiB")
            many(api, folder)
            print(f"server's peak memory after fifty pulls at once: {peak_mb(hub.pid):.0f} MiB")
        finally:
            hub.terminate()
            hub.wait()
            shutil.rmtree(folder)


def many(api: HfApi, folder: Path) -> None:
    """Pull one 20 MB adapter with fifty clients at the same time."""
    source = folder / "small"
    source.write_bytes(os.urandom(20 << 20))
    repo = api.create_repo("local/popular").repo_id
    push(api, repo, source, is_xet=False)
    expected = sha256_of(source)

    def one(number: int) -> bool:
        got = api.hf_hub_download(repo, "adapter_model.safetensors", cache_dir=folder / "many" / str(number))
        return hashlib.sha256(Path(got).read_bytes()).hexdigest() == expected

    with ThreadPoolExecutor(50) as pool:
        start = time.perf_counter()
        good = sum(pool.map(one, range(50)))
        taken = time.perf_counter() - start
    print(f"{good} of 50 pulls at once right, {taken:.1f} s, {50 * 20.97 / taken:.0f} MB/s")


if __name__ == "__main__":
    main()
