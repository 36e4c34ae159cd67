"""Measure adapters that are not resident: on disk, on a Hub, more than there are slots, and a thousand registered.

    .venv/bin/python benchmarks/residency.py [--threads 1] [--rounds 5]

SmolLM2-135M NF4, rank-16 adapters on all linear layers in files of their own, the engine behind its AdapterCache, no
HTTP. The files are in the page cache, as after a pull. Of the thousand, about thirty share a file. The Hub is ours,
a process on loopback; the download alone is what huggingface_hub's own download takes from it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fixtures"))

import decode
import torch
from hub_fixtures import ALICE, PEOPLE, start_hub
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from vllm import write_adapters as write_packages

from adapterhub.adapter import Adapter, AdapterRef, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.hub.client import Hub
from adapterhub.package.layout import open_adapter
from adapterhub.package.manifest import BaseEntry, Chat, FileEntry, Lora, Manifest
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine.engine import LocalEngine

NUM_FILES, SLOTS, TOKENS, PROMPT = 32, 32, 16, 16


def write_adapters(root: Path, engine: LocalEngine, count: int) -> list[Adapter]:
    """Register `count` adapters over NUM_FILES files, without the checks of packing."""
    bank = engine._runner.adapters
    for number in range(NUM_FILES):
        folder = root / str(number)
        folder.mkdir()
        tensors = {}
        for module, low in decode.random_adapter(bank, number).items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = low.a.float()
            tensors[f"base_model.model.{module}.lora_B.weight"] = low.bt.float().T.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"}'
        )
    return [_adapter(root / str(number % NUM_FILES), number) for number in range(count)]


def _adapter(folder: Path, number: int) -> Adapter:
    size = (folder / "adapter_model.safetensors").stat().st_size
    manifest = Manifest(
        name=str(number),
        base=BaseEntry(id="base", fingerprint="fp1:" + "0" * 64, revision=str(number)),
        lora=Lora(method="lora", rank=16, alpha=16, scaling=1, targets=[]),
        chat=Chat(template_sha256="0" * 64, bos=None, eos=None, pad=None),
        files={"adapter_model.safetensors": FileEntry(sha256="0" * 64, size=size)},
    )
    return Adapter(folder, manifest)


class Server:
    """One engine; a fresh cache of a given size for each measurement."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self._number = 0

    def cache(self, slots: int) -> AdapterCache:
        return AdapterCache(slots, load=self.engine.load, unload=self.engine.unload)

    async def ask(self, cache: AdapterCache, adapter: Adapter, tokens: int = TOKENS) -> float:
        """Return the seconds to the first token, including loading the adapter if needed."""
        self._number += 1
        prompt = [1000 + self._number, *decode.prompts(1)[0][1:PROMPT]]
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        request = GenerationRequest(str(self._number), tuple(prompt), sampling, (AdapterScale(adapter.digest),))
        start, first = time.perf_counter(), 0.0
        async with cache.lease([adapter]):
            async for _ in self.engine.generate(request):
                first = first or time.perf_counter() - start
        return first

    async def empty(self, cache: AdapterCache) -> None:
        for digest in cache.resident:
            await cache.evict(digest)


async def cold(server: Server, adapters: list[Adapter], rounds: int) -> tuple[float, float]:
    """Return the median seconds to the first token for a resident adapter and for one on disk."""
    resident, on_disk = [], []
    cache = server.cache(1)
    for number in range(2 * rounds):
        adapter = adapters[number % NUM_FILES]
        on_disk.append(await server.ask(cache, adapter, 2))
        resident.append(await server.ask(cache, adapter, 2))
    await server.empty(cache)
    return statistics.median(resident[2:]), statistics.median(on_disk[2:])


async def on_a_hub(server: Server, stored: StoredBase, rounds: int) -> tuple[float, float]:
    """Return the median seconds to the first token of an adapter on a Hub, and of downloading its files."""
    whole, transfer = [], []
    cache = server.cache(1)
    with tempfile.TemporaryDirectory() as text, start_hub(Path(text) / "hub", PEOPLE) as url:
        hub, registry = Hub(url, ALICE), Registry(Path(text) / "home")
        for folder in write_packages(Path(text), stored)[: 2 * rounds + 1]:
            name = f"alice/{folder.name}"
            hub.push(open_adapter(folder), name)
            start = time.perf_counter()
            snapshot_download(name, endpoint=url, token=ALICE, local_dir=Path(text) / "plain" / folder.name)
            transfer.append(time.perf_counter() - start)
            start = time.perf_counter()
            adapter = await asyncio.to_thread(registry.pull, AdapterRef(name=name), hub)
            await server.ask(cache, adapter, 1)
            whole.append(time.perf_counter() - start)
    await server.empty(cache)
    return statistics.median(whole[1:]), statistics.median(transfer[1:])


async def crowded(server: Server, adapters: list[Adapter], slots: int, rounds: int) -> float:
    """Return the median seconds to the first token of 16 adapters in turn, with 4 clients."""
    cache = server.cache(slots)
    turns = iter([adapters[n % 16] for n in range(16 * (rounds + 1))])
    found: list[float] = []

    async def client() -> None:
        for adapter in turns:
            found.append(await server.ask(cache, adapter))

    await asyncio.gather(*(client() for _ in range(4)))
    await server.empty(cache)
    return statistics.median(found[16:])


def resident_mib() -> float:
    """Return the resident memory of this process, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


async def zipf(server: Server, adapters: list[Adapter], requests: int, seed: int) -> tuple[float, float]:
    """Return tokens/s of 16 clients whose adapters follow Zipf's law, 32 slots, after a warm-up of half as many.

    And the process's MiB at the end.
    """
    cache = server.cache(SLOTS)
    dice = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(adapters))]

    async def run(count: int) -> None:
        turns = iter(dice.choices(adapters, weights, k=count))

        async def client() -> None:
            for adapter in turns:
                await server.ask(cache, adapter)

        await asyncio.gather(*(client() for _ in range(16)))

    await run(requests // 2)
    start = time.perf_counter()
    await run(requests)
    seconds, memory = time.perf_counter() - start, resident_mib()
    await server.empty(cache)
    return requests * TOKENS / seconds, memory


async def measure(server: Server, stored: StoredBase, adapters: list[Adapter], rounds: int) -> None:
    resident, on_disk = await cold(server, adapters, rounds)
    print(f"| first token, adapter resident | {resident * 1e3:.0f} ms |")
    print(f"| first token, adapter on disk | {on_disk * 1e3:.0f} ms |")
    print(f"| **on disk - 1.3 x resident** (at most 60 ms) | {(on_disk - 1.3 * resident) * 1e3:.0f} ms |")
    whole, transfer = await on_a_hub(server, stored, rounds)
    print(f"| first token, adapter on a Hub / its download alone | {whole * 1e3:.0f} / {transfer * 1e3:.0f} ms |")
    print(f"| **on a Hub - download - 1.3 x resident** (at most 60 ms) | "
          f"{(whole - transfer - 1.3 * resident) * 1e3:.0f} ms |")  # fmt: skip
    turns: dict[int, list[float]] = {16: [], 8: []}
    for _ in range(2):
        for slots, found in turns.items():
            found.append(await crowded(server, adapters, slots, max(1, rounds // 2)))
    many, few = (statistics.median(found) for found in turns.values())
    print(f"| median first token, 16 active adapters, 16 slots / 8 slots | {many * 1e3:.0f} / {few * 1e3:.0f} ms |")
    print(f"| **8 slots / 16 slots** (at most 3) | {few / many:.2f} |")
    mixes: dict[int, list[tuple[float, float]]] = {32: [], 1000: []}
    for turn in range(max(2, rounds // 2)):
        for count, values in mixes.items():
            values.append(await zipf(server, adapters[:count], 96, turn))
    (some, small), (thousand, large) = ([statistics.median(x) for x in zip(*v, strict=True)] for v in mixes.values())
    print(f"| Zipf mix, 16 clients, 32 slots, 32 / 1,000 registered | {some:.0f} / {thousand:.0f} tokens/s |")
    print(f"| **1,000 / 32 registered** (at least 0.9) | {thousand / some:.2f} |")
    print(f"| memory of the process with 32 / 1,000 registered | {small:.0f} / {large:.0f} MiB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    stored = decode.stored_base()
    engine = LocalEngine(load_base(stored, purpose="serve", dtype="float32"))

    async def run() -> None:
        with tempfile.TemporaryDirectory() as text:
            adapters = write_adapters(Path(text), engine, 1000)
            gc.collect()
            gc.freeze()  # as the server does
            print("\n| | |\n|---|---|")
            await measure(Server(engine), stored, adapters, chosen.rounds)
        await engine.close()

    asyncio.run(run())


if __name__ == "__main__":
    main()
