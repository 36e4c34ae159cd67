"""Memory that is used only once written, and tensors one behind the other."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import load_tiny

from adapterhub.adapter import BaseName, StoredBase
from adapterhub.errors import UsageError
from adapterhub.memory.known_shapes import shape_of
from adapterhub.memory.serving import ServingLoad, estimate_serving
from serve.adapters.weights import LowRank
from serve.local_engine.attention import KvCache, KvShape
from serve.local_engine.cpu.memory import HugePages, trim_heap, zeros
from serve.local_engine.lora_layers import in_one_block
from serve.local_engine.model_runner import ModelRunner


def _resident() -> int:
    """Bytes of this process that are in memory."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def test_zeros_are_used_as_far_as_they_are_written() -> None:
    before = _resident()
    block = zeros([64, 1 << 20], torch.uint8)
    assert not block[::7, ::4096].any()
    assert _resident() - before < 8 << 20
    block[:16] = 1
    assert 12 << 20 < _resident() - before < 24 << 20
    assert int(block.count_nonzero()) == 16 << 20
    del block
    assert _resident() - before < 8 << 20


def test_what_lies_free_between_tensors_in_use_goes_back() -> None:
    tensors = [torch.ones(16 << 10, dtype=torch.uint8) for _ in range(10_000)]
    full = _resident()
    del tensors[:-1]
    if full - _resident() > 80 << 20:
        pytest.skip("this C library gave it back by itself")
    trim_heap()
    assert full - _resident() > 140 << 20


def test_a_cache_takes_what_its_written_slots_need() -> None:
    before = _resident()
    cache = KvCache(KvShape(8, 4, 64, torch.float32), 4096, 16, torch.device("cpu"))
    assert cache.layers.nbytes == 1 << 30
    cache.layers[:, :, :, : 64 * 16] = 1
    assert _resident() - before < 40 << 20


def test_tensors_lie_one_behind_the_other_from_lines_on() -> None:
    pages = HugePages(1 << 12)
    odd, wide, large = torch.randn(3, 5), torch.randn(7, 16).bfloat16().T, torch.randn(4096)
    kept = [pages.keep(tensor) for tensor in (odd, wide, large)]
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(kept, (odd, wide, large), strict=True))
    assert kept[1].data_ptr() == kept[0].data_ptr() + 64  # 60 bytes
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept)
    kept[0].fill_(1)
    assert torch.equal(kept[1], wide)


def test_updates_of_any_types_share_a_block_in_the_order_given() -> None:
    def update(dtype: torch.dtype, rank: int, magnitude: torch.Tensor | None = None) -> LowRank:
        return LowRank(torch.randn(rank, 16).to(dtype), torch.randn(rank, 3).to(dtype), 0.5, magnitude)

    weights = {"b": update(torch.bfloat16, 1, torch.ones(3)), "a": update(torch.float32, 2)}
    block = in_one_block(dict(weights))
    assert list(block) == ["b", "a"]
    halves = [half for change in block.values() if isinstance(change, LowRank) for half in (change.a, change.bt)]
    assert [half.data_ptr() - halves[0].data_ptr() for half in halves] == [0, 64, 128, 256]
    for module, before in weights.items():
        after = block[module]
        assert isinstance(after, LowRank)
        assert torch.equal(after.a, before.a)
        assert torch.equal(after.bt, before.bt)
        assert replace(after, a=before.a, bt=before.bt) == before


def test_an_adapter_lies_in_the_order_a_step_reads_it(tiny_base: StoredBase) -> None:
    bank = ModelRunner(load_tiny(tiny_base), num_blocks=4, block_size=16).adapters
    layers = {name: group.layers[place] for name, (group, place) in bank.places.items() if name != "lm_head"}
    weights = {
        name: LowRank(torch.randn(4, layer.in_features), torch.randn(4, layer.out_features), 1.0)
        for name, layer in sorted(layers.items(), reverse=True)
    }
    ready = {name: change for name, change in bank.prepare("a", {**weights}).items() if isinstance(change, LowRank)}
    attention, mlp = ("q", "k", "v", "o"), ("gate", "up", "down")
    assert list(ready) == [
        f"model.layers.{layer}.{part}.{word}_proj"
        for layer in (0, 1)
        for part, words in (("self_attn", attention), ("mlp", mlp))
        for word in words
    ]
    addresses = [half.data_ptr() for change in ready.values() for half in (change.a, change.bt)]
    assert addresses == sorted(addresses)
    assert addresses[-1] - addresses[0] < sum(change.a.nbytes + change.bt.nbytes for change in weights.values())


def test_a_cache_larger_than_any_memory() -> None:
    with pytest.raises(UsageError, match=r"of memory cannot be allocated .*ask for less"):
        KvCache(KvShape(1000, 1000, 1 << 17, torch.float32), 64, 16, torch.device("cpu"))


_SERVE = """
import asyncio, sys
import torch
from adapterhub.adapter import BaseName
from adapterhub.bases.loading import load_base
from adapterhub.bases.store import find_base
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine.engine import LocalEngine, LocalEngineConfig
from serve.adapters.weights import LowRank
from train.loop.progress import peak_memory_bytes

stored = find_base(BaseName.parse(sys.argv[1]))
engine = LocalEngine(load_base(stored, purpose="serve", dtype="float32"), LocalEngineConfig(kv_cache_bytes=94_371_840))
bank = engine._runner.adapters
for number in "01234567":
    layers = {name: group.layers[place] for name, (group, place) in bank.places.items() if name != "lm_head"}
    random = {
        name: LowRank(torch.randn(16, layer.in_features), torch.randn(16, layer.out_features), 0.001)
        for name, layer in layers.items()
    }
    bank.install(number, bank.prepare(number, random))


async def ask(number):
    prompt = tuple(range(1000 + 10 * int(number), 1240 + 10 * int(number)))
    request = GenerationRequest(number, prompt, SamplingParams(max_tokens=8, ignore_eos=True), (AdapterScale(number),))
    assert [chunk async for chunk in engine.generate(request)]


async def main():
    await asyncio.gather(*map(ask, "01234567"))
    await engine.close()


asyncio.run(main())
print(peak_memory_bytes())
"""


def test_the_peak_of_serving_the_real_base_lies_in_the_estimated_range(smollm2: StoredBase) -> None:
    """Eight adapters of rank 16, and requests that fill 2,048 tokens of keys and values."""
    shape = shape_of(BaseName.parse("smollm2-135m-instruct"))
    assert shape is not None
    found = estimate_serving(shape, ServingLoad(adapters=8, rank=16, kv_tokens=2048, requests=8, device="cpu"))
    command = [sys.executable, "-c", _SERVE, str(smollm2.path)]
    subprocess.run(command, capture_output=True, check=True)  # the first start also checks the base, in 200 MB more
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.low < int(done.stdout) < found.high
