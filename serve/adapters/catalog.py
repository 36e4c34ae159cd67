"""The model names of a server and the adapter that each points to; they change while requests run."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from adapterhub.adapter import Adapter, AdapterRef, StoredBase
from adapterhub.compatibility import check_base
from adapterhub.errors import AdapterNotFound, Conflict, UsageError
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache

_MAX_SHOWN = 500
"""Maximum number of characters shown of an unknown name."""


@dataclass(frozen=True)
class Published:
    """An adapter under the name that requests use."""

    name: str
    adapter: Adapter
    weight: float = 1.0
    """Share of the engine relative to others when requests wait (serve.local_engine.fairness)."""
    is_pinned: bool = False
    since: int = field(default_factory=lambda: int(time.time()))
    """Unix time of publication, in seconds."""


def clients_ref(text: str) -> AdapterRef:
    """Parse a client's reference, refusing paths, which are on the server's disk. Raises InvalidRef, UsageError."""
    ref = AdapterRef.parse(text)
    if ref.folder is not None:
        raise UsageError(f"{text} is a path on the server's disk, which clients may not choose: name an adapter.")
    return ref


class Catalog:
    """One base, under the operator's name or its own id, and the adapters published on it.

    Belongs to the event loop.
    """

    def __init__(self, base: StoredBase, base_name: str, registry: Registry, cache: AdapterCache) -> None:
        self.base = base
        self.base_name = base_name
        self.since = int(time.time())
        self._registry = registry
        self._cache = cache
        self._names: dict[str, Published] = {}
        self._leases: dict[str, ExitStack] = {}  # by name: the registry's gc deletes nothing that is served
        cache.set_published(lambda: {published.adapter.digest for published in self._names.values()})

    def list(self) -> Sequence[Published]:
        return tuple(self._names[name] for name in sorted(self._names))

    def find(self, name: str) -> Published | None:
        """Return the adapter published as `name`, or None for the base itself.

        Raises AdapterNotFound for any other name: an unknown adapter is never answered by the base.
        """
        if name in (self.base_name, self.base.ref.id):
            return None
        if name in self._names:
            return self._names[name]
        known = [self.base_name, *self._names]
        shown = name[:_MAX_SHOWN]  # a name in a path may be as long as a request line, and comparing takes its square
        near = difflib.get_close_matches(shown, known, n=3, cutoff=0.5) or known[:5]
        raise AdapterNotFound(f"the model {shown!r} does not exist here; nearest: {', '.join(near)}.")

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

        Publishing the same content again changes nothing. With `may_wait`, an adapter for which there is no room is
        published without being loaded, until a request names it. Raises Conflict when `name` points to another adapter
        and `replace` is not set, and what resolving, checking and loading raise.
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
        """Remove the name now; the adapter is evicted when its last lease ends."""
        published = self.find(name)
        if published is None:
            raise Conflict(f"{name!r} is the base model and stays loaded.")
        del self._names[name]
        self._leases.pop(name).close()
        self._cache.evict_unpublished()

    def _publish(self, published: Published, lease: ExitStack, *, replace: bool) -> None:
        self._check_free(published, replace=replace)  # the name may point to another adapter by now
        before = self._names.get(published.name)
        self._names[published.name] = published
        if before is not None:
            self._leases.pop(published.name).close()
            self._cache.evict_unpublished()
        self._leases[published.name] = lease.pop_all()

    def _check_free(self, published: Published, *, replace: bool) -> None:
        there = self._names.get(published.name)
        if there is not None and there.adapter.digest != published.adapter.digest and not replace:
            raise Conflict(
                f"{published.name!r} already points to {there.adapter.digest}: unload it first, or ask to replace it."
            )
