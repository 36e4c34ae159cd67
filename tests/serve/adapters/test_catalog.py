"""Names published while others come and go; loads that wait are held at the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from fake_engine import FakeEngine
from packages import FINGERPRINT, write_package

from adapterhub.adapter import Adapter, AdapterRef, BaseRef, StoredBase
from adapterhub.errors import Conflict
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.adapters.catalog import Catalog, Published


class _Slow(FakeEngine):
    """Loads begin, and end when they may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()
        self.begun: set[str] = set()

    async def load(self, adapter: Adapter) -> None:
        self.begun.add(adapter.digest)
        await self.may_end.wait()
        await super().load(adapter)


class _Cache(AdapterCache):
    """Says when a lease is asked for."""

    reached: asyncio.Event | None = None
    pinned_in_use: bool | None = None

    def pin(self, adapter: Adapter) -> None:
        self.pinned_in_use = self._residents[adapter.digest].leases > 0
        super().pin(adapter)

    def lease(self, adapters: Sequence[Adapter]) -> AbstractAsyncContextManager[None]:
        if self.reached is not None:
            self.reached.set()
        return super().lease(adapters)


@dataclass
class _Bench:
    catalog: Catalog
    registry: Registry
    engine: _Slow
    cache: _Cache
    unnamed: Adapter
    """In the registry, where no name points to it."""
    other: Adapter

    async def loading(self, name: str, adapter: Adapter) -> asyncio.Task[Published]:
        """Start a load that waits for the engine."""
        reached = asyncio.Event()
        self.cache.reached = reached
        task = asyncio.create_task(self.catalog.load(name, AdapterRef(digest=adapter.digest)))
        await reached.wait()
        while adapter.digest not in self.engine.begun:
            await asyncio.sleep(0)
        return task


def _run(tmp_path: Path, test: Callable[[_Bench], Awaitable[None]]) -> None:
    registry, engine = Registry(tmp_path / "home"), _Slow()
    packages = [write_package(tmp_path / f"p{seed}", name="captain", seed=seed) for seed in range(3)]
    unnamed, _, other = [registry.add(open_adapter(package)) for package in packages]
    cache = _Cache(8, load=engine.load, unload=engine.unload)
    base = StoredBase(tmp_path, BaseRef("owner/base", None, FINGERPRINT))
    bench = _Bench(Catalog(base, "base", registry, cache), registry, engine, cache, unnamed, other)

    async def whole() -> None:
        await asyncio.wait_for(test(bench), 20)

    asyncio.run(whole())
    cache.check()


def test_a_load_given_up_beside_one_of_the_same_content_leaves_that_its_lease(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        first = await b.loading("one", b.unnamed)
        second = await b.loading("two", b.unnamed)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert b.registry.gc(grace_s=0).packages == ()
        b.engine.may_end.set()
        await second
        assert b.registry.gc(grace_s=0).packages == ()
        b.catalog.unload("two")
        assert b.registry.gc(grace_s=0).packages == (b.unnamed.digest,)

    _run(tmp_path, test)


def test_a_name_unloaded_beside_a_load_of_the_same_content_leaves_that_its_lease(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        b.engine.may_end.set()
        await (await b.loading("one", b.unnamed))
        second = await b.loading("two", b.unnamed)
        b.catalog.unload("one")
        await second
        assert b.registry.gc(grace_s=0).packages == ()

    _run(tmp_path, test)


def test_of_two_loads_of_one_name_at_once_the_later_is_a_conflict(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        both = [await b.loading("one", adapter) for adapter in (b.unnamed, b.other)]
        b.engine.may_end.set()
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(second, Conflict)
        assert "already points to" in str(second)
        assert [published.adapter.digest for published in b.catalog.list()] == [b.unnamed.digest]
        assert b.catalog.find("one") is first

    _run(tmp_path, test)


def test_what_the_later_of_two_loads_brought_goes_again(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        both = [await b.loading("one", adapter) for adapter in (b.unnamed, b.other)]
        b.engine.may_end.set()
        await asyncio.gather(*both, return_exceptions=True)
        while b.cache._unloading:
            await asyncio.sleep(0)
        assert b.engine.loaded == {b.unnamed.digest}

    _run(tmp_path, test)


def test_content_named_again_while_its_last_request_ends(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        b.engine.may_end.set()
        await (await b.loading("one", b.unnamed))
        async with b.cache.lease([b.unnamed]):
            b.catalog.unload("one")
            await b.catalog.load("two", AdapterRef(digest=b.unnamed.digest), is_pinned=True)
        while b.cache._unloading:
            await asyncio.sleep(0)
        assert b.cache.resident == (b.unnamed.digest,)

    _run(tmp_path, test)


def test_pin_comes_before_anything_could_evict(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        b.engine.may_end.set()
        await b.catalog.load("one", AdapterRef(digest=b.unnamed.digest), is_pinned=True)
        assert b.cache.pinned_in_use

    _run(tmp_path, test)


def test_what_is_unloaded_between_a_request_and_its_lease_does_not_stay(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        b.engine.may_end.set()
        await (await b.loading("one", b.unnamed))
        found = b.catalog.find("one")
        assert found is not None
        b.catalog.unload("one")
        async with b.cache.lease([found.adapter]):
            assert b.cache.resident == (b.unnamed.digest,)
        while b.cache._unloading:
            await asyncio.sleep(0)
        assert b.engine.loaded == set()

    _run(tmp_path, test)


def test_what_is_unloaded_while_its_request_waits_for_room_does_not_stay(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        b.cache.capacity = 1
        b.engine.may_end.set()
        await (await b.loading("other", b.other))

        async def ask() -> None:
            async with b.cache.lease([b.unnamed]):
                assert b.cache.resident == (b.unnamed.digest,)

        async with b.cache.lease([b.other]):
            await b.catalog.load("one", AdapterRef(digest=b.unnamed.digest), may_wait=True)
            waiting = asyncio.create_task(ask())
            while not b.cache._waiting:
                await asyncio.sleep(0)
            b.catalog.unload("one")
        await waiting
        while b.cache._unloading:
            await asyncio.sleep(0)
        assert b.engine.loaded == set()

    _run(tmp_path, test)


def test_a_load_given_up_before_it_had_a_name_does_not_stay(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        loading = await b.loading("one", b.unnamed)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        b.engine.may_end.set()
        while b.cache._residents or b.cache._unloading:
            await asyncio.sleep(0)
        assert b.engine.loaded == set()

    _run(tmp_path, test)


def test_what_no_name_points_to_any_more_is_no_longer_pinned(tmp_path: Path) -> None:
    async def test(b: _Bench) -> None:
        b.engine.may_end.set()
        await b.catalog.load("one", AdapterRef(digest=b.unnamed.digest), is_pinned=True)
        await b.catalog.load("two", AdapterRef(digest=b.unnamed.digest))
        b.catalog.unload("one")
        assert b.cache._pinned == {b.unnamed.digest}
        b.catalog.unload("two")
        assert b.cache._pinned == set()
        while b.cache._unloading:
            await asyncio.sleep(0)

    _run(tmp_path, test)
