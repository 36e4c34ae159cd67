"""Time a store of many small adapters: list, resolve, add, gc and verify --all, each with its peak memory.

    .venv/bin/python benchmarks/registry_scale.py [--adapters 10000] [--folder FOLDER]

Packages of five files, of which template and config are shared. The store is filled without flushing, which is not
timed; each command is timed in a process of its own, after its imports, on files in the page cache. FOLDER is where the
store is made; its file system decides what flushing costs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fixtures"))

from packages import write_package

from adapterhub.files import sha256_of
from adapterhub.package.layout import open_adapter
from adapterhub.package.manifest import MANIFEST_NAME, FileEntry, Manifest
from adapterhub.registry.registry import Registry

WEIGHTS = "adapter_model.safetensors"
NUM_UNUSED = 100
NUM_ADDED = 20

MEASURE = """
import resource, sys, time
from pathlib import Path
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry
registry, packages = Registry(Path(sys.argv[1])), [Path(path) for path in sys.argv[3:]]
adapters = [open_adapter(path) for path in packages]
acts = {
    "list": lambda: registry.list(),
    "resolve": lambda: registry.resolve("owner/name-00042"),
    "add": lambda: [registry.add(adapter, name=f"new/{n}") for n, adapter in enumerate(adapters)],
    "gc": lambda: registry.gc(grace_s=0),
    "verify --all": lambda: list(registry.verify_all()),
}
start = time.perf_counter()
acts[sys.argv[2]]()
taken = time.perf_counter() - start
peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{taken / max(len(packages), 1) * 1000:.1f} {peak_kib / 1024:.0f}")
"""


def variants(folder: Path, count: int) -> list[Path]:
    """Write packages that differ in one value of their weights."""
    first = write_package(folder / "first", name="small")
    data, manifest = (first / WEIGHTS).read_bytes(), Manifest.model_validate_json((first / MANIFEST_NAME).read_bytes())
    made = []
    for number in range(count):
        target = folder / f"{number:05d}"
        target.mkdir()
        for path in first.iterdir():
            if path.name not in (WEIGHTS, MANIFEST_NAME):
                os.link(path, target / path.name)
        (target / WEIGHTS).write_bytes(data[:-4] + number.to_bytes(3, "little") + data[-1:])
        entry = FileEntry(sha256=sha256_of(target / WEIGHTS), size=len(data))
        changed = manifest.model_copy(update={"files": manifest.files | {WEIGHTS: entry}})
        (target / MANIFEST_NAME).write_text(changed.to_json())
        made.append(target)
    return made


def fill(registry: Registry, packages: list[Path]) -> None:
    """Add all, without flushing; the last NUM_UNUSED lose their names again."""
    flush, os.fsync = os.fsync, lambda fd: None
    try:
        for number, package in enumerate(packages):
            registry.add(open_adapter(package), name=f"owner/name-{number:05d}")
        for number in range(len(packages) - NUM_UNUSED, len(packages)):
            registry.remove(f"owner/name-{number:05d}")
    finally:
        os.fsync = flush


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as text:
        work = Path(text)
        packages = variants(work / "packages", options.adapters + NUM_UNUSED + NUM_ADDED)
        registry = Registry(work / "store")
        fill(registry, packages[:-NUM_ADDED])
        print("| | ms | peak memory, MB |\n|---|---|---|")
        for act in ("list", "resolve", "add", "gc", "verify --all"):
            added = map(str, packages[-NUM_ADDED:] if act == "add" else [])
            command = [sys.executable, "-c", MEASURE, str(registry.root), act, *added]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(f"| {act} | {' | '.join(done.stdout.split())} |", flush=True)


if __name__ == "__main__":
    main()
