"""Which adapters are resident in the engine: load once, lease, evict the least recently used idle one.

Belongs to the event loop. Knows digests and counts; the engine does the loading.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapterhub.adapter import Adapter
from adapterhub.errors import ServerBusy


@dataclass
class _Resident:
    loaded: asyncio.Future[None]
    leases: int = 0


class AdapterCache:
    """At most `capacity` adapters resident; `load` and `unload` are the engine's."""

    def __init__(
        self,
        capacity: int,
        *,
        load: Callable[[Adapter], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        wait_s: float = 30.0,
    ) -> None:
        self.capacity = capacity
        self._load = load
        self._unload = unload
        self._wait_s = wait_s
        self._residents: dict[str, _Resident] = {}  # least recently used first
        self._changed = asyncio.Condition()

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

    async def drop(self, digest: str) -> None:
        """Unload an adapter when its last lease ends (at once when it is idle)."""
        async with self._changed:
            await self._changed.wait_for(lambda: digest not in self._residents or self._is_idle(digest))
            if self._residents.pop(digest, None):
                await self._unload(digest)
                self._changed.notify_all()

    def check(self) -> None:
        """The books when nothing runs: no lease left, no more residents than allowed."""
        assert all(r.leases == 0 for r in self._residents.values()), "a lease was not released"
        assert len(self._residents) <= self.capacity, "more adapters resident than allowed"

    async def _take(self, wanted: Mapping[str, Adapter]) -> list[_Resident]:
        async with self._changed:
            await self._make_room(wanted)
            residents = []
            for digest, adapter in wanted.items():
                resident = self._residents.pop(digest, None)
                if resident is None:
                    resident = _Resident(asyncio.ensure_future(self._load_or_forget(adapter)))
                self._residents[digest] = resident  # now the most recently used
                resident.leases += 1
                residents.append(resident)
            return residents

    async def _make_room(self, wanted: Mapping[str, Adapter]) -> None:
        def surplus() -> int:
            """How many must go so that all wanted ones fit."""
            return len(self._residents.keys() | wanted.keys()) - self.capacity

        def victims() -> list[str]:
            return [digest for digest in self._residents if digest not in wanted and self._is_idle(digest)]

        try:
            await asyncio.wait_for(self._changed.wait_for(lambda: len(victims()) >= surplus()), self._wait_s)
        except TimeoutError:
            raise ServerBusy(
                f"all {self.capacity} adapter slots were in use for {self._wait_s:.0f} s: try again, or serve with "
                "a larger --max-loras."
            ) from None
        for victim in victims()[: max(0, surplus())]:
            del self._residents[victim]
            await self._unload(victim)

    def _is_idle(self, digest: str) -> bool:
        resident = self._residents[digest]
        return resident.leases == 0 and resident.loaded.done()

    async def _load_or_forget(self, adapter: Adapter) -> None:
        try:
            await self._load(adapter)
        except BaseException:
            self._residents.pop(adapter.digest, None)
            raise
