"""Which adapters are resident in the engine: load once, lease, pin, evict the least recently used idle one.

Belongs to the event loop. Knows digests, counts and bytes; the engine does the loading. A request takes its lease when
it arrives, so what it needs is loaded while it waits and while others are answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapterhub.adapter import Adapter
from adapterhub.errors import ServerBusy, UsageError
from adapterhub.lora_config import WEIGHTS_NAME


@dataclass
class _Resident:
    loaded: asyncio.Future[None]
    size_bytes: int
    leases: int = 0


class AdapterCache:
    """At most `capacity` adapters of `max_bytes` in all are resident; `load` and `unload` are the engine's."""

    def __init__(
        self,
        capacity: int,
        *,
        load: Callable[[Adapter], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        max_bytes: int | None = None,
        wait_s: float = 30.0,
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self._load = load
        self._unload = unload
        self._wait_s = wait_s
        self._residents: dict[str, _Resident] = {}  # least recently used first
        self._pinned: set[str] = set()
        self._changed = asyncio.Condition()

    @property
    def resident_bytes(self) -> int:
        return sum(resident.size_bytes for resident in self._residents.values())

    def has_room(self, adapter: Adapter) -> bool:
        """Could it be loaded without evicting another?"""
        return adapter.digest in self._residents or not self._is_too_much({adapter.digest: adapter})

    def pin(self, adapter: Adapter) -> None:
        """Never evict it once it is resident; `drop` ends that, too."""
        self._pinned.add(adapter.digest)

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of loaded adapters, least recently used first."""
        return tuple(d for d, r in self._residents.items() if r.loaded.done() and not r.loaded.cancelled())

    @asynccontextmanager
    async def lease(self, adapters: Sequence[Adapter]) -> AsyncIterator[None]:
        """The right to use `adapters` until the block ends; they are loaded first if they must be.

        All are taken at once: requests that each held one and waited for another would wait for ever.
        Raises ServerBusy when they do not fit beside those in use for `wait_s`, and what loading raises.
        """
        residents = await self._take({adapter.digest: adapter for adapter in adapters})
        try:
            for resident in residents:
                # Shielded: a client that gives up must not cancel the load others wait for.
                await asyncio.shield(resident.loaded)
            yield
        finally:
            for resident in residents:
                resident.leases -= 1
            async with self._changed:
                self._changed.notify_all()

    async def drop(self, digest: str, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Unload an adapter when its last lease ends (at once when it is idle), `unless` it is wanted again by then."""
        if not unless():
            self._pinned.discard(digest)
        async with self._changed:
            await self._changed.wait_for(lambda: digest not in self._residents or self._is_idle(digest))
            if digest in self._residents and not unless():
                del self._residents[digest]
                await self._unload(digest)
                self._changed.notify_all()

    def check(self) -> None:
        """The books when nothing runs: no lease left, no more residents than allowed."""
        assert all(r.leases == 0 for r in self._residents.values()), "a lease was not released"
        assert len(self._residents) <= self.capacity, "more adapters resident than allowed"
        assert self.max_bytes is None or self.resident_bytes <= self.max_bytes, "more bytes resident than allowed"

    async def _take(self, wanted: Mapping[str, Adapter]) -> list[_Resident]:
        async with self._changed:
            await self._make_room(wanted)
            residents = []
            for digest, adapter in wanted.items():
                resident = self._residents.pop(digest, None)
                if resident is None:
                    resident = _Resident(asyncio.ensure_future(self._load_or_forget(adapter)), size_of(adapter))
                self._residents[digest] = resident  # now the most recently used
                resident.leases += 1
                residents.append(resident)
            return residents

    async def _make_room(self, wanted: Mapping[str, Adapter]) -> None:
        self._refuse_what_never_fits(wanted)
        try:
            await asyncio.wait_for(self._changed.wait_for(lambda: self._victims(wanted) is not None), self._wait_s)
        except TimeoutError:
            raise ServerBusy(
                f"the {len(self._residents)} adapters resident were in use or pinned for {self._wait_s:.0f} s: try "
                "again, or serve with a larger --max-loras or --lora-memory-mb."
            ) from None
        for victim in self._victims(wanted) or ():
            del self._residents[victim]
            await self._unload(victim)

    def _victims(self, wanted: Mapping[str, Adapter]) -> list[str] | None:
        """Who must go so that all wanted ones fit, least recently used first; None while that is not enough."""
        chosen: list[str] = []
        for digest in self._residents:
            if not self._is_too_much(wanted, without=chosen):
                break
            if digest not in wanted and digest not in self._pinned and self._is_idle(digest):
                chosen.append(digest)
        return None if self._is_too_much(wanted, without=chosen) else chosen

    def _is_too_much(self, wanted: Mapping[str, Adapter], *, without: Sequence[str] = ()) -> bool:
        sizes = {digest: one.size_bytes for digest, one in self._residents.items() if digest not in without}
        sizes |= {digest: size_of(adapter) for digest, adapter in wanted.items()}
        return len(sizes) > self.capacity or (self.max_bytes is not None and sum(sizes.values()) > self.max_bytes)

    def _refuse_what_never_fits(self, wanted: Mapping[str, Adapter]) -> None:
        size = sum(map(size_of, wanted.values()))
        if len(wanted) > self.capacity:
            raise UsageError(
                f"{len(wanted)} adapters together are more than the {self.capacity} this server holds: name fewer, or "
                "serve with a larger --max-loras."
            )
        if self.max_bytes is not None and size > self.max_bytes:
            raise UsageError(
                f"the adapter needs {size:,} bytes, this server holds adapters of {self.max_bytes:,}: serve with a "
                "larger --lora-memory-mb."
            )

    def _is_idle(self, digest: str) -> bool:
        resident = self._residents[digest]
        return resident.leases == 0 and resident.loaded.done()

    async def _load_or_forget(self, adapter: Adapter) -> None:
        try:
            await self._load(adapter)
        except BaseException:
            self._residents.pop(adapter.digest, None)
            raise


def size_of(adapter: Adapter) -> int:
    """Bytes an adapter takes when resident: those of its file, whose fp32 and bf16 tensors are kept as they are."""
    return adapter.manifest.files[WEIGHTS_NAME].size
