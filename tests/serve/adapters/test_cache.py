"""Residency without an engine: loads are recorded, leases and evictions are checked."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from adapterhub.errors import AdapterLoadFailed, ServerBusy, UsageError
from serve.adapters import cache as adapter_cache
from serve.adapters.cache import AdapterCache


def _adapter(name: str, size: int = 10) -> Any:
    files = {"adapter_model.safetensors": SimpleNamespace(size=size)}
    return SimpleNamespace(digest=name, manifest=SimpleNamespace(files=files))


@dataclass
class FakeEngine:
    """Knows what is loaded, and complains about a wrong order of things."""

    loaded: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    holds: dict[str, asyncio.Event] = field(default_factory=dict)
    """`+a` or `-a`: this load or unload ends when the event is set"""

    async def load(self, adapter: Any) -> None:
        await asyncio.sleep(0)
        await self._held(f"+{adapter.digest}")
        if adapter.digest in self.fails:
            raise AdapterLoadFailed("no")
        assert adapter.digest not in self.loaded, "loaded twice"
        self.loaded.add(adapter.digest)
        self.log.append(f"+{adapter.digest}")

    async def unload(self, digest: str) -> None:
        await self._held(f"-{digest}")
        self.loaded.remove(digest)
        self.log.append(f"-{digest}")

    async def _held(self, what: str) -> None:
        if what in self.holds:
            await self.holds[what].wait()


def _cache(engine: FakeEngine, capacity: int, wait_s: float = 5.0, **options: Any) -> AdapterCache:
    return AdapterCache(capacity, load=engine.load, unload=engine.unload, wait_s=wait_s, **options)


async def _settle() -> None:
    """Let everything continue that can."""
    for _ in range(20):
        await asyncio.sleep(0)


@dataclass
class Client:
    """Holds a lease from when it is granted until it is asked to leave."""

    cache: AdapterCache
    names: str
    has_lease: asyncio.Event = field(default_factory=asyncio.Event)
    may_leave: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self.task = asyncio.create_task(self._use())

    async def _use(self) -> None:
        async with self.cache.lease([_adapter(name) for name in self.names]):
            self.has_lease.set()
            await self.may_leave.wait()

    async def leave(self) -> None:
        self.may_leave.set()
        await self.task
        await _settle()

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def _ask(cache: AdapterCache, *names: str) -> list[Client]:
    """Clients that come one after the other."""
    clients = []
    for name in names:
        clients.append(Client(cache, name))
        await _settle()
    return clients


def _served(clients: list[Client]) -> str:
    return "".join("x" if client.has_lease.is_set() else "." for client in clients)


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
        await _settle()
        assert engine.log == ["+a", "+b", "+c", "-b", "-c", "+large"]
        assert cache.resident_bytes == 100
        cache.check()

    asyncio.run(run())


def test_more_than_the_cache_can_hold_is_refused_at_once() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 1, max_bytes=50)
        with pytest.raises(UsageError, match=r"60 bytes.*50"):
            await _use(cache, _adapter("a", 60))
        with pytest.raises(UsageError, match="2 adapters"):
            await _use(cache, _adapter("a", 10), _adapter("b", 10))

    asyncio.run(run())


def test_a_pinned_adapter_is_evicted_only_by_request() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 2, wait_s=0.01)
        await _use(cache, _adapter("pinned"))
        cache.pin(_adapter("pinned"))
        for name in "abc":
            await _use(cache, _adapter(name))
            await _settle()
        assert "pinned" in engine.loaded
        cache.pin(_adapter("c"))
        with pytest.raises(ServerBusy, match="pinned"):
            await _use(cache, _adapter("d"))
        await cache.evict("c")
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


def test_an_evicted_adapter_goes_when_its_last_lease_ends() -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 2)
        async with cache.lease([_adapter("a")]):
            eviction = asyncio.create_task(cache.evict("a"))
            for _ in range(10):
                await asyncio.sleep(0)
            assert engine.loaded == {"a"}
        await eviction
        assert engine.loaded == set()

    asyncio.run(run())


@pytest.mark.parametrize("fails", [False, True], ids=["loads", "fails"])
def test_a_waiter_is_served_when_a_load_ends_whose_client_has_left(fails: bool) -> None:
    async def run() -> None:
        engine = FakeEngine(holds={"+a": asyncio.Event()}, fails={"a"} if fails else set())
        cache = _cache(engine, 1)
        a, b = await _ask(cache, "a", "b")
        await a.cancel()
        await _settle()
        assert not b.has_lease.is_set()
        engine.holds["+a"].set()
        await _settle()
        assert b.has_lease.is_set()
        await b.leave()
        cache.check()

    asyncio.run(run())


@pytest.mark.parametrize("fails", [False, True], ids=["loads", "fails"])
def test_an_eviction_ends_when_a_load_ends_whose_client_has_left(fails: bool) -> None:
    async def run() -> None:
        engine = FakeEngine(holds={"+a": asyncio.Event()}, fails={"a"} if fails else set())
        cache = _cache(engine, 1)
        (a,) = await _ask(cache, "a")
        eviction = asyncio.create_task(cache.evict("a"))
        await a.cancel()
        engine.holds["+a"].set()
        await eviction
        assert engine.loaded == set()
        cache.check()

    asyncio.run(run())


def test_no_lease_waits_for_the_unload_of_another_adapter() -> None:
    async def run() -> None:
        engine = FakeEngine(holds={"-a": asyncio.Event(), "+s": asyncio.Event()})
        cache = _cache(engine, 4)
        await _use(cache, _adapter("a"))
        await _use(cache, _adapter("b"))
        eviction = asyncio.create_task(cache.evict("a"))
        slow, resident, missing, again = await _ask(cache, "s", "b", "c", "a")
        assert _served([slow, resident, missing, again]) == ".xx."
        engine.holds["-a"].set()  # a load of the same digest waits for its own unload only
        await _settle()
        assert _served([slow, resident, missing, again]) == ".xxx"
        engine.holds["+s"].set()
        for client in (slow, resident, missing, again):
            await client.leave()
        await eviction
        cache.check()

    asyncio.run(run())


def test_an_unload_that_fails_holds_nobody_up() -> None:
    async def run() -> None:
        async def unload(_: str) -> None:
            raise RuntimeError("the engine has ended")

        cache = AdapterCache(1, load=FakeEngine().load, unload=unload)
        await _use(cache, _adapter("a"))
        await _use(cache, _adapter("b"))
        await cache.evict("b")
        cache.check()

    asyncio.run(run())


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_an_adapter_kept_busy_by_overlapping_leases_gives_way_when_its_turn_is_over(capacity: int) -> None:
    async def run() -> None:
        now = 0.0
        engine = FakeEngine()
        cache = _cache(engine, capacity, clock=lambda: now, turn_s=2.0)
        busy = await _ask(cache, *"abc"[:capacity])
        (other,) = await _ask(cache, "x")
        now = 1.9
        busy += await _ask(cache, *"abc"[:capacity])
        assert _served(busy) == "x" * len(busy)  # their turn
        now = 2.0
        late = await _ask(cache, *"abc"[:capacity])
        assert _served(late) == "." + "x" * (capacity - 1)  # only one must go
        for client in busy[::capacity]:  # those of a
            assert not other.has_lease.is_set()
            await client.leave()
        assert other.has_lease.is_set()
        await other.leave()
        assert _served(late) == "x" * capacity
        for client in [*busy[1::capacity], *busy[2::capacity], *late]:
            await client.leave()
        cache.check()

    asyncio.run(run())


def test_an_adapter_with_requests_left_over_comes_after_those_that_wait_for_others() -> None:
    async def run() -> None:
        now = 0.0
        engine = FakeEngine()
        cache = _cache(engine, 1, clock=lambda: now, turn_s=2.0, max_leases=2)
        clients = await _ask(cache, *"aaaaabcb")
        assert _served(clients) == "xx......"
        for number, turn in enumerate(["xx......", "xx...x.x", "xx...xxx", "xxxx.xxx", "xxxxxxxx"]):
            now = 10.0 * (number + 1)
            await _ask(cache)
            assert _served(clients) == turn
            for client in [one for one in clients if one.has_lease.is_set() and not one.may_leave.is_set()]:
                await client.leave()
        assert engine.log == ["+a", "-a", "+b", "-b", "+c", "-c", "+a"]
        cache.check()

    asyncio.run(run())


def test_leases_are_counted_only_where_there_is_not_room_for_all() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 3, max_leases=2)
        clients = await _ask(cache, *"aaaabc")
        assert _served(clients) == "xxxxxx"
        late = await _ask(cache, "a", "b")
        assert _served(late) == ".x"
        for client in [*clients, *late]:
            await client.leave()
        cache.check()

    asyncio.run(run())


def test_an_idle_adapter_goes_before_one_in_use_is_asked_to() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 2, turn_s=0.0)
        busy, idle = await _ask(cache, "a", "b")
        (other,) = await _ask(cache, "c")
        await idle.leave()
        clients = [other, *await _ask(cache, "a")]
        assert _served(clients) == "xx"
        for client in [busy, *clients]:
            await client.leave()
        cache.check()

    asyncio.run(run())


def test_when_who_waited_gives_up_the_drained_adapter_is_leased_again() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 1, turn_s=0.0)
        clients = await _ask(cache, "a", "b", "a", "a")
        assert _served(clients) == "x..."
        await clients[1].cancel()
        await _settle()
        assert _served(clients) == "x.xx"
        for client in (clients[0], *clients[2:]):
            await client.leave()
        cache.check()

    asyncio.run(run())


@pytest.mark.parametrize("turn_s", [0.0, 1e9], ids=["draining", "in its turn"])
def test_a_small_adapter_does_not_take_the_room_an_older_large_one_waits_for(turn_s: float) -> None:
    async def run() -> None:
        engine = FakeEngine()
        cache = _cache(engine, 9, max_bytes=100, turn_s=turn_s)
        async with cache.lease([_adapter("a", 60)]):
            large = asyncio.create_task(_use(cache, _adapter("large", 100)))
            await _settle()
            small = asyncio.create_task(_use(cache, _adapter("small", 10)))
            await _settle()
            assert engine.log == ["+a"]
        await large
        await small
        cache.check()

    asyncio.run(run())


def test_what_pinned_adapters_leave_no_room_for_is_refused_at_once() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 2, wait_s=1e9)
        async with cache.lease([_adapter("a"), _adapter("b")]):
            (waiting,) = await _ask(cache, "c")
            cache.pin(_adapter("a"))
            cache.pin(_adapter("b"))
            with pytest.raises(ServerBusy, match="2 pinned adapters"):
                await _use(cache, _adapter("d"))
            with pytest.raises(ServerBusy, match="pin fewer"):
                await waiting.task
        await _use(cache, _adapter("a"))
        cache.check()

    asyncio.run(run())


def test_a_server_that_holds_no_adapter_refuses_each_and_answers_without() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 0)
        await _use(cache)
        with pytest.raises(UsageError, match="the 0 slots of this server"):
            await _use(cache, _adapter("a"))

    asyncio.run(run())


def test_too_many_that_wait_are_refused_and_who_need_not_wait_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(adapter_cache, "MAX_WAITING", 3)
        cache = _cache(FakeEngine(), 1, turn_s=1e9)
        clients = await _ask(cache, *"abcd")
        with pytest.raises(ServerBusy, match="3 requests are waiting"):
            await _use(cache, _adapter("e"))
        await _use(cache, _adapter("a"))
        await _use(cache)
        for client in clients:
            await client.leave()
        cache.check()

    asyncio.run(run())


def test_who_is_cancelled_in_the_moment_it_is_granted_leaves_no_lease() -> None:
    async def run() -> None:
        cache = _cache(FakeEngine(), 1)
        first, second, third = await _ask(cache, "a", "b", "a")
        first.may_leave.set()
        third.may_leave.set()
        while any(waiter.wanted.keys() == {"b"} for waiter in cache._waiting):
            await asyncio.sleep(0)
        second.task.cancel()  # granted, and not yet told
        await asyncio.gather(first.task, second.task, third.task, return_exceptions=True)
        await _settle()
        cache.check()

    asyncio.run(run())


class Clock:
    """Time in ticks, each of which lets everything continue that can."""

    def __init__(self) -> None:
        self.now = 0
        self._sleeping: list[tuple[int, asyncio.Event]] = []

    async def sleep(self, ticks: int) -> None:
        event = asyncio.Event()
        self._sleeping.append((self.now + ticks, event))
        await event.wait()

    async def tick(self) -> None:
        await _settle()
        self.now += 1
        for _, event in [one for one in self._sleeping if one[0] <= self.now]:
            event.set()
        self._sleeping = [one for one in self._sleeping if one[0] > self.now]


LOAD, UNLOAD, TURN, ANSWER = 2, 1, 5, 8  # ticks at most


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_asked_for_waits_no_longer_than_the_bound(seed: int) -> None:
    """A flood for some adapters, single requests for others, never idle: nobody's wait exceeds a round of turns."""

    async def run() -> None:
        dice = random.Random(seed)
        clock = Clock()
        names = "abcdef"[: dice.randint(2, 6)]
        capacity = dice.randint(1, 3)

        async def load(_: Any) -> None:
            await clock.sleep(dice.randint(1, LOAD))

        async def unload(_: str) -> None:
            await clock.sleep(dice.randint(1, UNLOAD))

        cache = AdapterCache(capacity, load=load, unload=unload, turn_s=TURN, clock=lambda: clock.now)
        waits: dict[str, list[int]] = {name: [] for name in names}

        async def client(name: str, pause: int) -> None:
            while clock.now < 400:
                began = clock.now
                async with cache.lease([_adapter(name)]):
                    waits[name].append(clock.now - began)
                    await clock.sleep(dice.randint(1, ANSWER))
                await clock.sleep(dice.randint(0, pause))

        clients = [client(name, pause=dice.choice([0, 0, 20])) for name in names for _ in range(dice.choice([1, 4, 8]))]
        tasks = [asyncio.create_task(one) for one in clients]
        while not all(task.done() for task in tasks):
            await clock.tick()
            assert clock.now < 1000, "somebody waits for ever"
        await asyncio.gather(*tasks)
        await clock.tick()
        # One tick each for a lease and for an unload to be noticed.
        assert max(max(found) for found in waits.values()) <= len(names) * (TURN + ANSWER + UNLOAD + LOAD + 2)
        cache.check()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(60))
def test_random_use_loses_no_wake_up_and_balances_the_books(seed: int) -> None:
    """Clients that give up anywhere, evictions, pins, loads that fail, slow unloads, names that go: nothing hangs."""

    async def run() -> None:
        dice = random.Random(seed)
        engine = FakeEngine()
        clock = Clock()
        named = set("abcdefg")
        with_names = dice.random() < 0.5

        async def load(adapter: Any) -> None:
            await clock.sleep(dice.randint(0, 2))
            if dice.random() < 0.1:
                raise AdapterLoadFailed("no")
            await engine.load(adapter)

        async def unload(digest: str) -> None:
            await clock.sleep(dice.randint(0, 2))
            await engine.unload(digest)

        capacity = dice.randint(1, 4)
        cache = AdapterCache(
            capacity, load=load, unload=unload, turn_s=dice.randint(0, 4), clock=lambda: clock.now,
            max_leases=dice.choice([None, 1, 3]), max_bytes=dice.choice([None, capacity * 7]),
        )  # fmt: skip
        if with_names:
            cache.set_published(lambda: named)

        async def use() -> None:
            names = dice.sample("abcdefg", dice.randint(1, min(2, capacity)))
            async with cache.lease([_adapter(name, ord(name) % 4 + 3) for name in names]):
                for _ in range(dice.randint(0, 5)):
                    await clock.sleep(dice.randint(0, 1))
                    assert set(names) <= engine.loaded
                if dice.random() < 0.1:
                    raise RuntimeError("a request fails")

        async def disturb() -> None:
            name = dice.choice("abcdefg")
            what = dice.random()
            if what < 0.4:
                await cache.evict(name)
            elif what < 0.5 and capacity > 1:
                cache.pin(_adapter(name))
            elif with_names:
                named.symmetric_difference_update(name)
                cache.evict_unpublished()

        async def guarded() -> None:
            await clock.sleep(dice.randint(0, 20))
            task = asyncio.create_task(use() if dice.random() < 0.85 else disturb())
            if dice.random() < 0.3:
                for _ in range(dice.randint(0, 12)):
                    await asyncio.sleep(0)
                await clock.sleep(dice.choice([0, 0, 1, 5]))
                task.cancel()
            with contextlib.suppress(AdapterLoadFailed, ServerBusy, UsageError, RuntimeError, asyncio.CancelledError):
                await task

        tasks = [asyncio.create_task(guarded()) for _ in range(60)]
        while not all(task.done() for task in tasks):
            await clock.tick()
            assert clock.now < 2000, "somebody waits for ever"
        await asyncio.gather(*tasks)
        for _ in range(5):
            await clock.tick()
        cache.check()
        assert set(cache.resident) == engine.loaded
        assert not with_names or engine.loaded <= named

    asyncio.run(run())
