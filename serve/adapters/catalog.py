"""The names a server answers to: which adapter each leads to, published and retired while requests run."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from adapterhub.adapter import Adapter, AdapterRef, StoredBase
from adapterhub.errors import AdapterNotFound, Conflict, UsageError
from adapterhub.package.layout import check_base
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache

_LONGEST_SAID = 500
"""characters of a name that does not exist"""


@dataclass(frozen=True)
class Published:
    name: str
    adapter: Adapter
    weight: float = 1.0
    """share beside others when requests wait (serve.local_engine.fairness)"""
    is_pinned: bool = False
    since: int = field(default_factory=lambda: int(time.time()))
    """unix time, s"""


def clients_ref(text: str) -> AdapterRef:
    """What a client may name: no path, which would be one on the server's disk. Raises InvalidRef, UsageError."""
    ref = AdapterRef.parse(text)
    if ref.folder is not None:
        raise UsageError(f"{text} is a path on the server's disk, which clients may not choose: name an adapter.")
    return ref


class Catalog:
    """One base, under the operator's name for it or its own id, and the adapters published on it.

    Belongs to the event loop.
    """

    def __init__(self, base: StoredBase, base_name: str, registry: Registry, cache: AdapterCache) -> None:
        self.base = base
        self.base_name = base_name
        self.since = int(time.time())
        self._registry = registry
        self._cache = cache
        self._names: dict[str, Published] = {}
        self._leases: dict[str, ExitStack] = {}  # by name: the registry collects nothing that is served
        cache.keep_only(lambda: {published.adapter.digest for published in self._names.values()})

    def list(self) -> Sequence[Published]:
        return tuple(self._names[name] for name in sorted(self._names))

    def find(self, name: str) -> Published | None:
        """The adapter published as `name`, None for the base itself.

        Raises AdapterNotFound for any other name: an unknown adapter is never answered by the base.
        """
        if name in (self.base_name, self.base.ref.id):
            return None
        if name in self._names:
            return self._names[name]
        known = [self.base_name, *self._names]
        said = name[:_LONGEST_SAID]  # a name in a path may be as long as a request line, and comparing takes its square
        near = difflib.get_close_matches(said, known, n=3, cutoff=0.5) or known[:5]
        raise AdapterNotFound(f"the model {said!r} does not exist here; nearest: {', '.join(near)}.")

    async def load(
        self,
        name: str,
        ref: AdapterRef,
        *,
        replace: bool = False,
        weight: float = 1.0,
        is_pinned: bool = False,
        may_wait: bool = False,
    ) -> Published:
        """Resolve, verify, load beside the others, then publish; a failure changes nothing.

        The same content again is no change. With `may_wait`, one for which there is no room is published as it is and
        loaded when it is asked for. Raises Conflict when `name` leads elsewhere and `replace` is not asked for, and
        whatever resolving, checking and loading raise.
        """
        if name in (self.base_name, self.base.ref.id):
            raise Conflict(f"{name!r} is the base model's own name: choose another for the adapter.")
        adapter = await asyncio.to_thread(self._registry.resolve, ref)
        check_base(adapter, self.base)
        before = self._names.get(name)
        if before is not None and before.adapter.digest == adapter.digest:
            return before
        published = Published(name, adapter, weight, is_pinned)
        self._check_free(published, replace=replace)
        with ExitStack() as lease:
            lease.enter_context(self._registry.lease(adapter))
            if may_wait and not is_pinned and not self._cache.has_room(adapter):
                self._publish(published, lease, replace=replace)
            else:
                async with self._cache.lease([adapter]):
                    self._publish(published, lease, replace=replace)
                    if is_pinned:
                        self._cache.pin(adapter)
        return published

    def unload(self, name: str) -> None:
        """Forget the name now; the adapter itself goes when the last request using it ends."""
        published = self.find(name)
        if published is None:
            raise Conflict(f"{name!r} is the base model and stays loaded.")
        del self._names[name]
        self._leases.pop(name).close()
        self._cache.sweep()

    def _publish(self, published: Published, lease: ExitStack, *, replace: bool) -> None:
        self._check_free(published, replace=replace)  # another may have come to lead there meanwhile
        before = self._names.get(published.name)
        self._names[published.name] = published
        if before is not None:
            self._leases.pop(published.name).close()
            self._cache.sweep()
        self._leases[published.name] = lease.pop_all()

    def _check_free(self, published: Published, *, replace: bool) -> None:
        there = self._names.get(published.name)
        if there is not None and there.adapter.digest != published.adapter.digest and not replace:
            raise Conflict(
                f"{published.name!r} already leads to {there.adapter.digest}: unload it first, or ask to replace it."
            )
