"""Residency without an engine: loads are recorded, leases and evictions are checked."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from adapterhub.errors import AdapterLoadFailed, ServerBusy, UsageError
from serve.adapter_cache import AdapterCache


def _adapter(name: str, size: int = 10) -> Any:
    files = {"adapter_model.safetensors": SimpleNamespace(size=size)}
    return SimpleNamespace(digest=name, manifest=SimpleNamespace(files=files))


@dataclass
class FakeEngine:
    """Knows what is loaded, and complains about a wrong order of things."""

    loaded: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)

    async def load(self, adapter: Any) -> None:
        await asyncio.sleep(0)
        if adapter.digest in self.fails:
            raise AdapterLoadFailed("no")
        assert adapter.digest not in self.loaded, "loaded twice"
        self.loaded.add(adapter.digest)
        self.log.append(f"+{adapter.digest}")

    async def unload(self, digest: str) -> None:
        self.loaded.remove(digest)
        self.log.append(f"-{digest}")


def _cache(engine: FakeEngine, capacity: int, wait_s: float = 5.0, max_bytes: int | None = None) -> AdapterCache:
    return AdapterCache(capacity, load=engine.load, unload=engine.unload, wait_s=wait_s, max_bytes=max_bytes)


async def _use(cache: AdapterCache, *adapters: Any) -> None:
    async with cache.lease(adapters):
        pass


def test_bytes_bound_what_is_resident_and_the_least_recently_used_go() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 10, max_bytes=100)
        for name, size in (("a", 40), ("b", 30), ("c", 20), ("a", 40)):
            await _use(cache, _adapter(name, size))
        await _use(cache, _adapter("large", 60))
        assert engine.log == ["+a", "+b", "+c", "-b", "-c", "+large"]
        assert cache.resident_bytes == 100
        cache.check()

    asyncio.run(run())


def test_what_never_fits_is_refused_at_once() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 1, max_bytes=50)
        with pytest.raises(UsageError, match=r"60 bytes.*50"):
            await _use(cache, _adapter("a", 60))
        with pytest.raises(UsageError, match="2 adapters"):
            await _use(cache, _adapter("a", 10), _adapter("b", 10))

    asyncio.run(run())


def test_a_pinned_adapter_is_never_evicted_until_it_is_dropped() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 2, wait_s=0.01)
        await _use(cache, _adapter("pinned"))
        cache.pin(_adapter("pinned"))
        for name in "abc":
            await _use(cache, _adapter(name))
        assert "pinned" in engine.loaded
        cache.pin(_adapter("c"))
        with pytest.raises(ServerBusy, match="pinned"):
            await _use(cache, _adapter("d"))
        await cache.drop("c")
        await _use(cache, _adapter("d"))
        assert engine.loaded == {"pinned", "d"}

    asyncio.run(run())


def test_an_adapter_is_loaded_once_for_many_at_once() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 2)

        async def use() -> None:
            async with cache.lease([_adapter("a")]):
                assert "a" in engine.loaded

        await asyncio.gather(*(use() for _ in range(20)))
        assert engine.log == ["+a"]
        cache.check()

    asyncio.run(run())


def test_the_least_recently_used_idle_one_is_evicted() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 2)
        for name in ("a", "b", "a", "c"):
            async with cache.lease([_adapter(name)]):
                pass
        assert engine.log == ["+a", "+b", "-b", "+c"]

    asyncio.run(run())


def test_a_leased_adapter_is_never_evicted_and_the_next_waits_for_it() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 1)
        entered = asyncio.Event()

        async def other() -> None:
            async with cache.lease([_adapter("b")]):
                entered.set()

        async with cache.lease([_adapter("a")]):
            task = asyncio.create_task(other())
            for _ in range(10):
                await asyncio.sleep(0)
            assert engine.loaded == {"a"}
            assert not entered.is_set()
        await task
        assert engine.loaded == {"b"}

    asyncio.run(run())


def test_waiting_too_long_for_a_slot_says_the_server_is_busy() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 1, wait_s=0.01)
        async with cache.lease([_adapter("a")]):
            with pytest.raises(ServerBusy, match="max-loras"):
                async with cache.lease([_adapter("b")]):
                    pass
        cache.check()

    asyncio.run(run())


def test_a_failed_load_leaves_no_trace_and_can_be_tried_again() -> None:
    async def run() -> None:
        engine = FakeEngine(fails={"a"})
        cache = _cache(engine, 1)
        with pytest.raises(AdapterLoadFailed):
            async with cache.lease([_adapter("a")]):
                pass
        cache.check()
        assert cache.resident == ()
        engine.fails.clear()
        async with cache.lease([_adapter("a")]):
            assert engine.loaded == {"a"}

    asyncio.run(run())


def test_a_dropped_adapter_goes_when_its_last_lease_ends() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 2)
        async with cache.lease([_adapter("a")]):
            drop = asyncio.create_task(cache.drop("a"))
            for _ in range(10):
                await asyncio.sleep(0)
            assert engine.loaded == {"a"}
        await drop
        assert engine.loaded == set()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(30))
def test_random_use_never_unloads_what_is_leased(seed: int) -> None:
    async def run() -> None:
        dice = random.Random(seed)
        engine = FakeEngine()
        cache = _cache(engine, 3)

        async def use() -> None:
            names = dice.sample("abcdefg", dice.randint(1, 2))
            async with cache.lease([_adapter(name) for name in names]):
                for _ in range(dice.randint(0, 5)):
                    await asyncio.sleep(0)
                    assert set(names) <= engine.loaded
                if dice.random() < 0.1:
                    raise RuntimeError("a request fails")

        async def guarded() -> None:
            for _ in range(dice.randint(0, 10)):
                await asyncio.sleep(0)
            task = asyncio.create_task(use())
            if dice.random() < 0.2:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*(guarded() for _ in range(60)))
        cache.check()
        assert set(cache.resident) == engine.loaded

    asyncio.run(run())
