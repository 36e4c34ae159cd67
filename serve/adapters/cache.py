"""Residency of adapters in the engine: load, lease, pin, evict, and take turns where not all fit.

Belongs to the event loop. Works on digests, counts and bytes; the engine does the loading. A request asks for its lease
when it arrives, so that its adapters are loaded while it waits and others are answered. State changes without awaiting,
so there is no lock: every event (a lease is asked for or ends, a load or an unload ends) is followed by `_advance`,
which grants what can be granted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from adapterhub.adapter import Adapter
from adapterhub.errors import ServerBusy, UsageError
from adapterhub.package.lora_config import WEIGHTS_NAME
from adapterhub.units import format_bytes

log = logging.getLogger(__name__)

MAX_WAITING = 1024
"""Maximum number of requests that wait for a lease; further ones are refused."""


def file_size(adapter: Adapter) -> int:
    """Return the size of an adapter's weights file, in bytes."""
    return adapter.manifest.files[WEIGHTS_NAME].size


@dataclass(eq=False)
class _Resident:
    size_bytes: int
    loading: asyncio.Task[None] = field(init=False)
    turn_began: float | None = None
    """Time at which it was loaded; None until then."""
    leases: int = 0

    @property
    def is_idle(self) -> bool:
        return self.leases == 0 and self.turn_began is not None


@dataclass(eq=False)
class _Waiter:
    wanted: Mapping[str, Adapter]
    answer: asyncio.Future[ServerBusy | None]
    """Set when the lease is granted (None) or refused."""
    residents: list[_Resident] = field(default_factory=list)


@dataclass
class _Pass:
    """State of one pass over the queue: what older waiters than the current one need."""

    draining: set[str]
    """Residents that get no new lease, so that they become idle and can be evicted."""
    reserved: dict[str, int] = field(default_factory=dict)
    """Digest -> bytes of what older waiters need and do not have yet."""


class AdapterCache:
    """Slots for up to `capacity` resident adapters of `max_bytes` in all; `load` and `unload` are the engine's.

    Where there is no room, adapters take turns, in the order in which they were first asked for. An idle adapter that
    is not pinned is evicted at once, the least recently used first. Otherwise the adapter whose turn has lasted the
    longest, and at least `turn_s`, is drained: it gets no new lease, and is evicted when its leases end. Requests for
    it that are left over join the queue behind those for other adapters. So an adapter waits, for each adapter asked
    for before it, at most `turn_s`, the answers then running (`max_leases` of an adapter, where not all fit), an unload
    and a load.
    """

    def __init__(
        self,
        capacity: int,
        *,
        load: Callable[[Adapter], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        max_bytes: int | None = None,
        size_of: Callable[[Adapter], int] = file_size,
        max_leases: int | None = None,
        turn_s: float = 2.0,
        wait_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self._load = load
        self._unload = unload
        self._size_of = size_of
        self._known_sizes: dict[str, int] = {}
        self._max_leases = max_leases
        self._turn_s = turn_s
        self._wait_s = wait_s
        self._clock = clock
        self._residents: dict[str, _Resident] = {}  # least recently used first
        self._unloading: dict[str, tuple[int, asyncio.Task[None]]] = {}
        """Bytes and unload task of adapters that are evicted, but still in the engine."""
        self._evictions: dict[str, asyncio.Event] = {}
        """Set when the adapter is out of the engine."""
        self._pinned: set[str] = set()
        self._waiting: list[_Waiter] = []
        self._published: Callable[[], Collection[str]] | None = None

    @property
    def resident_bytes(self) -> int:
        """Size of all adapters in the engine, in bytes."""
        return sum(self._sizes().values())

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of loaded adapters, least recently used first."""
        return tuple(digest for digest, one in self._residents.items() if one.turn_began is not None)

    def has_room(self, adapter: Adapter) -> bool:
        """Return whether `adapter` is resident, or can be loaded without evicting another."""
        return adapter.digest in self._residents or self._fits(self._sizes() | self._sizes_of([adapter]))

    def pin(self, adapter: Adapter) -> None:
        """Never evict `adapter` once it is resident, until `evict`, or until it is no longer published."""
        self._pinned.add(adapter.digest)

    def set_published(self, digests: Callable[[], Collection[str]]) -> None:
        """Evict idle adapters from now on whose digest is not in `digests()`; call `evict_unpublished` on changes."""
        self._published = digests

    def evict_unpublished(self) -> None:
        """Evict adapters that are no longer published: at once when idle, else when their last lease ends."""
        if self._published is not None:
            self._pinned.intersection_update(self._published())
        self._advance()

    @asynccontextmanager
    async def lease(self, adapters: Sequence[Adapter]) -> AsyncIterator[None]:
        """Lease `adapters` until the block ends; they are loaded first where needed.

        All are leased at once: requests that each had one and waited for another would wait forever. Where adapters
        take turns, so would one that asks for a second lease within its first.
        Raises UsageError for what never fits; ServerBusy when pinned adapters leave no room, when MAX_WAITING others
        wait, or after waiting `wait_s`; and what loading raises.
        """
        wanted = {adapter.digest: adapter for adapter in adapters}
        self._refuse_what_never_fits(wanted)
        waiter = _Waiter(wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            self._advance()
            await self._granted(waiter)
            for resident in waiter.residents:
                # A client that gives up must not cancel a load that others wait for: `wait` does not.
                await asyncio.wait([resident.loading])
                resident.loading.result()
            yield
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            for resident in waiter.residents:
                resident.leases -= 1
            self._advance()

    async def evict(self, digest: str) -> None:
        """Evict an adapter when its leases end, at once when it is idle. Return when it is out of the engine."""
        self._pinned.discard(digest)
        is_gone = self._evictions.setdefault(digest, asyncio.Event())
        self._advance()
        await is_gone.wait()

    def check(self) -> None:
        """Check the invariants of an idle cache: no waiter, no lease, no more residents than allowed."""
        assert not self._waiting, "a request still waits"
        assert all(one.leases == 0 for one in self._residents.values()), "a lease was not released"
        assert all(one.is_idle for one in self._residents.values()), "a load never ended"
        assert not self._unloading, "an unload never ended"
        assert not self._evictions, "an eviction never ended"
        assert self._fits(self._sizes()), "more adapters or bytes resident than allowed"

    async def _granted(self, waiter: _Waiter) -> None:
        if not waiter.answer.done() and len(self._waiting) > MAX_WAITING:
            raise ServerBusy(f"{MAX_WAITING} requests are waiting for their adapters already: try again shortly.")
        try:
            async with asyncio.timeout(self._wait_s):
                refusal = await waiter.answer
        except TimeoutError:
            raise ServerBusy(
                f"the {len(self._residents)} adapters resident were in use for {self._wait_s:g} s: try again, or serve "
                "with a larger --max-loras or --lora-memory-mb."
            ) from None
        if refusal is not None:
            raise refusal

    def _advance(self) -> None:
        """Grant leases, the oldest request first, and begin to evict what makes room for the others."""
        self._end_evictions()
        while self._has_evicted_for_waiters():
            pass

    def _end_evictions(self) -> None:
        for digest in list(self._evictions):
            if digest not in self._residents and digest not in self._unloading:
                self._evictions.pop(digest).set()
        idle = {digest for digest, one in self._residents.items() if one.is_idle}
        unwanted = idle.intersection(self._evictions)
        if idle and self._published is not None:
            unwanted |= idle.difference(self._published())
        for digest in unwanted:
            self._evict(digest)

    def _has_evicted_for_waiters(self) -> bool:
        """Go through the queue once. Return True when an adapter was evicted, which changes the queue's order."""
        state = _Pass(draining=set(self._evictions))
        in_vain: set[frozenset[str]] = set()
        is_blocked = False
        # A waiter that needs no room waits for leases of others to end, and delays no one's turn: it comes last.
        for waiter in sorted(self._waiting, key=lambda one: one.wanted.keys() <= self._residents.keys()):
            wanted = frozenset(waiter.wanted)
            needs_room = not wanted <= self._residents.keys()
            if waiter.answer.done() or wanted in in_vain or (needs_room and is_blocked):
                continue
            if self._can_lease(waiter, state):
                self._grant(waiter)
                continue
            in_vain.add(wanted)
            if not needs_room or wanted & state.draining:
                continue  # it has its maximum of leases, or its turn is over: it needs room again once evicted
            if self._is_left_no_room(waiter):
                self._waiting.remove(waiter)
                waiter.answer.set_result(self._no_room())
                continue
            victims = self._victims(waiter, state)
            if victims is None:  # no waiter that needs room overtakes it
                victims, is_blocked = [], True
            idle = [digest for digest in victims if self._residents[digest].is_idle]
            for digest in idle:
                self._evict(digest)
            if idle:
                return True
            state.draining.update(victims)
            state.reserved |= self._sizes_of(waiter.wanted.values())
        return False

    def _can_lease(self, waiter: _Waiter, state: _Pass) -> bool:
        there = waiter.wanted.keys() & self._residents.keys()
        if there & state.draining or waiter.wanted.keys() & self._unloading.keys():
            return False
        is_short = bool(state.reserved) or self._is_full()
        if is_short and any(not self._is_below_max_leases(self._residents[digest]) for digest in there):
            return False
        missing = [adapter for digest, adapter in waiter.wanted.items() if digest not in there]
        return not missing or self._fits(self._sizes() | state.reserved | self._sizes_of(missing))

    def _victims(self, waiter: _Waiter, state: _Pass) -> list[str] | None:
        """Return whom to evict, besides those draining, to make room for `waiter`; None if that is not enough."""
        staying = {digest: one for digest, one in self._residents.items() if digest not in state.draining}
        needed = self._sizes_of(waiter.wanted.values()) | state.reserved
        free = [digest for digest in staying if digest not in needed and digest not in self._pinned]
        idle = [digest for digest in free if staying[digest].is_idle]
        busy = [(began, digest) for digest in free if (began := staying[digest].turn_began) is not None]
        is_over = self._clock() - self._turn_s
        chosen: list[str] = []
        sizes = {digest: one.size_bytes for digest, one in staying.items()} | needed
        for digest in [*idle, *(digest for began, digest in sorted(busy) if digest not in idle and began <= is_over)]:
            if self._fits(sizes):
                break
            del sizes[digest]
            chosen.append(digest)
        return chosen if self._fits(sizes) else None

    def _is_left_no_room(self, waiter: _Waiter) -> bool:
        pinned = {digest: one.size_bytes for digest, one in self._residents.items() if digest in self._pinned}
        return not self._fits(pinned | self._sizes_of(waiter.wanted.values()))

    def _is_full(self) -> bool:
        """Return whether there is no room for one more adapter as large as the largest resident."""
        sizes = self._sizes()
        return not self._fits({**sizes, "": max(sizes.values(), default=0)})

    def _is_below_max_leases(self, resident: _Resident) -> bool:
        return self._max_leases is None or resident.leases < self._max_leases

    def _grant(self, waiter: _Waiter) -> None:
        self._waiting.remove(waiter)
        for digest, adapter in waiter.wanted.items():
            resident = self._residents.pop(digest, None)
            if resident is None:
                resident = _Resident(self._size(adapter))
                resident.loading = asyncio.create_task(self._load_one(resident, adapter))
                resident.loading.add_done_callback(_note_exception)
            self._residents[digest] = resident  # now the most recently used
            resident.leases += 1
            waiter.residents.append(resident)
        waiter.answer.set_result(None)

    async def _load_one(self, resident: _Resident, adapter: Adapter) -> None:
        try:
            await self._load(adapter)
            resident.turn_began = self._clock()
        except BaseException:
            del self._residents[adapter.digest]
            raise
        finally:
            self._advance()

    def _evict(self, digest: str) -> None:
        size = self._residents.pop(digest).size_bytes
        self._unloading[digest] = size, asyncio.create_task(self._unload_one(digest))
        # It had its turn: waiters for it alone come after waiters for others.
        self._waiting.sort(key=lambda waiter: waiter.wanted.keys() == {digest})

    async def _unload_one(self, digest: str) -> None:
        try:
            await self._unload(digest)
        except Exception:  # the engine, or a server of it, has ended and has no adapters any more
            log.exception("adapter %s could not be unloaded", digest)
        finally:
            del self._unloading[digest]
            self._advance()

    def _sizes(self) -> dict[str, int]:
        """Return digest -> bytes of all adapters in the engine."""
        leaving = {digest: size for digest, (size, _) in self._unloading.items()}
        return leaving | {digest: one.size_bytes for digest, one in self._residents.items()}

    def _sizes_of(self, adapters: Collection[Adapter]) -> dict[str, int]:
        return {adapter.digest: self._size(adapter) for adapter in adapters}

    def _size(self, adapter: Adapter) -> int:
        if adapter.digest not in self._known_sizes:
            self._known_sizes[adapter.digest] = self._size_of(adapter)
        return self._known_sizes[adapter.digest]

    def _fits(self, sizes: Mapping[str, int]) -> bool:
        return len(sizes) <= self.capacity and (self.max_bytes is None or sum(sizes.values()) <= self.max_bytes)

    def _refuse_what_never_fits(self, wanted: Mapping[str, Adapter]) -> None:
        size = sum(map(self._size, wanted.values()))
        if len(wanted) > self.capacity:
            raise UsageError(
                f"{len(wanted)} adapters together are more than the {self.capacity} slots of this server: name fewer, "
                "or serve with a larger --max-loras."
            )
        if self.max_bytes is not None and size > self.max_bytes:
            raise UsageError(
                f"the adapter needs {format_bytes(size)}, this server has {format_bytes(self.max_bytes)} for adapters: "
                "serve with a larger --lora-memory-mb."
            )

    def _no_room(self) -> ServerBusy:
        return ServerBusy(
            f"{len(self._pinned)} pinned adapters leave no room for this one: pin fewer, or serve with a larger "
            "--max-loras or --lora-memory-mb."
        )


def _note_exception(loading: asyncio.Task[None]) -> None:
    """Mark a failed load's exception as retrieved, since all waiters may have left."""
    if not loading.cancelled():
        loading.exception()
