"""Measure the registry against copying and hashing: a 200 MB adapter, a list of 10,000 names and 50 pulls at once.

    .venv/bin/python benchmarks/registry.py [--rounds 5] [--megabytes 200] [--names 10000]

Our own Hub server as a child process, on loopback; files in the page cache. Peers: `shutil.copyfile`, one sha256 pass.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fixtures"))

import numpy as np
from hub_fixtures import ALICE, PEOPLE, start_hub
from packages import write_manifest, write_peft_folder
from safetensors.numpy import save_file

from adapterhub.adapter import AdapterRef
from adapterhub.files import sha256_of
from adapterhub.hub.client import Hub
from adapterhub.package.layout import open_adapter
from adapterhub.registry.name_log import Move, NameLog, Summary, now
from adapterhub.registry.registry import Registry

WEIGHTS = "adapter_model.safetensors"
NUM_PULLS = 50


def timed(act: Callable[[], object]) -> float:
    """Return the seconds that the call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def write_adapter(folder: Path, megabytes: int, seed: int) -> Path:
    """Write a package of that size with random fp32 weights in 32 layers."""
    write_peft_folder(folder)
    rank, layers = 4, 32
    width = megabytes * 1_000_000 // (4 * rank * 2 * layers)
    random = np.random.default_rng(seed)
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {}
    for layer in range(layers):
        tensors[key.format(layer, "A")] = random.standard_normal((rank, width), "float32")
        tensors[key.format(layer, "B")] = random.standard_normal((width, rank), "float32")
    save_file(tensors, folder / WEIGHTS)
    write_manifest(folder)
    return folder


def write_names(registry: Registry, folder: Path, count: int) -> None:
    """Write `count` names that each point to a package of their own, as `add` does but without its checks."""
    adapter = open_adapter(folder)
    log = NameLog(registry.root / "names")
    log.folder.mkdir(parents=True)
    about = Summary.of(adapter.manifest)
    text = (folder / "adapterhub.json").read_text()
    for number in range(count):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        package = registry.store.folder(f"sha256:{digest}")
        package.mkdir(parents=True)
        (package / "adapterhub.json").write_text(text)
        move = Move(
            at=now(), by="bench", act="add", revision="main", before=None, after=f"sha256:{digest}", about=about
        )
        (log.folder / f"team%2Fadapter-{number}.jsonl").write_text(move.model_dump_json() + "\n")


def carrying(work: Path, url: str, rounds: int, megabytes: int) -> dict[str, list[float]]:
    """Return the seconds of each action, in turn; every push and pull is of a new adapter."""
    took: dict[str, list[float]] = {name: [] for name in ("copy + sha256", "sha256", "verify", "push", "pull", "add")}
    hub = Hub(url, ALICE)
    for number in range(rounds + 1):
        folder = write_adapter(work / f"p{number}", megabytes, number)
        weights = folder / WEIGHTS
        adapter = open_adapter(folder)
        registry = Registry(work / f"home{number}")
        acts: dict[str, Callable[[], object]] = {
            "copy + sha256": lambda w=weights: (shutil.copyfile(w, work / "copy"), sha256_of(work / "copy")),
            "sha256": lambda w=weights: sha256_of(w),
            "verify": lambda f=folder: open_adapter(f),
            "push": lambda a=adapter, n=number: hub.push(a, f"alice/p{n}"),
            "pull": lambda r=registry, n=number: r.pull(AdapterRef(name=f"alice/p{n}"), hub),
            "add": lambda a=adapter, n=number: Registry(work / f"other{n}").add(a),
        }
        for name, act in acts.items():
            seconds = timed(act)
            if number:  # the first round warms up
                took[name].append(seconds)
        for path in (folder, registry.root, work / f"other{number}"):
            shutil.rmtree(path)
    return took


def pulls_at_once(work: Path, url: str) -> float:
    """Return the seconds of 50 pulls of one 20 MB adapter into separate registries. Raises if one fails."""
    hub = Hub(url, ALICE)
    digest = open_adapter(write_adapter(work / "shared", 20, 0)).digest
    hub.push(open_adapter(work / "shared"), "alice/shared")

    def pull(number: int) -> None:
        found = Registry(work / f"at-once-{number}").pull(AdapterRef(name="alice/shared"), Hub(url, ALICE))
        assert found.digest == digest

    with ThreadPoolExecutor(NUM_PULLS) as pool:
        return timed(lambda: list(pool.map(pull, range(NUM_PULLS))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--names", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapterhub-bench-") as text:
        work = Path(text)
        with start_hub(work / "hub", PEOPLE) as url:
            took = carrying(work, url, options.rounds, options.megabytes)
            at_once = pulls_at_once(work, url)
        crowded = Registry(work / "crowded")
        write_names(crowded, write_adapter(work / "tiny", 1, 0), options.names)
        listing = [timed(crowded.list) for _ in range(3)]
        command = [Path(sys.executable).with_name("adapterhub"), "list", "--json"]
        environment = {**os.environ, "ADAPTERHUB_HOME": str(crowded.root)}
        whole = [
            timed(lambda: subprocess.run(command, env=environment, check=True, capture_output=True)) for _ in "123"
        ]
    middle = {name: statistics.median(seconds) for name, seconds in took.items()}
    for name, seconds in took.items():
        print(f"| {name} | {middle[name] * 1000:.0f} | {min(seconds) * 1000:.0f}-{max(seconds) * 1000:.0f} |")
    print(f"| verify / sha256 | {middle['verify'] / middle['sha256']:.2f} |")
    for name in ("push", "pull", "add"):
        print(f"| speed of {name} / copy + sha256 | {middle['copy + sha256'] / middle[name]:.2f} |")
    print(f"| list of {options.names:,} | {statistics.median(listing):.2f} s |")
    print(f"| `adapterhub list --json` of {options.names:,} | {statistics.median(whole):.2f} s |")
    print(f"| {NUM_PULLS} pulls at once of 20 MB | {at_once:.1f} s, none failed |")
    print(json.dumps({name: [round(s, 4) for s in seconds] for name, seconds in took.items()}))


if __name__ == "__main__":
    main()
