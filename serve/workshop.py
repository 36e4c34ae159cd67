"""What a server's training runs begin from and what becomes of them: feedback before, registry and names after."""

from __future__ import annotations

import asyncio
import tomllib

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.base_store import list_bases
from adapterhub.errors import UsageError
from adapterhub.package import open_adapter
from adapterhub.registry import DEFAULT_REVISION, Registry
from serve.catalog import Catalog, clients_ref
from serve.feedback import FeedbackStore
from serve.improvement import Improvement
from serve.training_runs import TrainingRun, TrainingRuns


class Workshop:
    """Joins the runs to feedback, registry and catalog; belongs to the event loop."""

    def __init__(self, runs: TrainingRuns, feedback: FeedbackStore, registry: Registry, catalog: Catalog) -> None:
        self._runs = runs
        self._feedback = feedback
        self._registry = registry
        self._catalog = catalog

    async def improve(self, ref: str, improvement: Improvement) -> TrainingRun:
        """Begin a run from all feedback there is, on an adapter as it is served or kept here.

        Raises UsageError, AdapterNotFound, TrainingBusy.
        """
        served = {published.name: published.adapter for published in self._catalog.list()}
        adapter = served[ref] if ref in served else await asyncio.to_thread(self._kept, ref)
        if not await asyncio.to_thread(self._feedback.counts):
            raise UsageError("there is no feedback to learn from yet: votes with a winner and corrections are.")
        base = await asyncio.to_thread(_name_of_base, adapter)
        recipe = improvement.recipe(adapter, base=base)
        await asyncio.to_thread(self._keep, adapter)
        improves = await asyncio.to_thread(self._name_of, adapter)
        return await self._runs.start(recipe, improves=improves)

    async def publish(self, name: str, *, by: str | None = None) -> str:
        """Pack what a run made, keep it, and let it answer beside the others. Returns the name it answers to.

        Raises TrainingRunNotFound, UsageError for a run that is not complete, and what packing and loading raise.
        """
        adapter = await self._packed(name)
        called = f"{adapter.manifest.name}-{name.rpartition('-')[2]}"
        kept = await asyncio.to_thread(self._registry.add, adapter, name=called, by=by)
        await self._catalog.load(called, AdapterRef(digest=kept.digest), replace=True)
        return called

    async def promote(self, name: str, *, by: str | None = None) -> str:
        """Let the name that an improvement began from lead to its result, here and wherever it is served.

        Raises as publish does, and UsageError for a run that improves nothing.
        """
        run = await asyncio.to_thread(self._runs.get, name)
        if run.improves is None:
            raise UsageError(f"run {name} began from no adapter: publish it under a name of its own.")
        adapter = await self._packed(name)
        kept = await asyncio.to_thread(self._registry.add, adapter, name=run.improves, by=by)
        before = tomllib.loads(run.recipe).get("start")
        for published in self._catalog.list():
            if published.adapter.digest == before:
                await self._catalog.load(
                    published.name, AdapterRef(digest=kept.digest), replace=True,
                    weight=published.weight, is_pinned=published.is_pinned,
                )  # fmt: skip
        return run.improves

    async def _packed(self, name: str) -> Adapter:
        await self._runs.pack(name)
        return await asyncio.to_thread(open_adapter, self._runs.folder / name)

    def _name_of(self, adapter: Adapter) -> str:
        """What the registry calls it, under whatever name it is served."""
        kept = (entry for entry in self._registry.list() if entry.digest == adapter.digest)
        names = [entry.name for entry in kept if entry.revision == DEFAULT_REVISION]
        return names[0] if names else adapter.manifest.name

    def _kept(self, text: str) -> Adapter:
        return Registry(self._registry.root).resolve(clients_ref(text))

    def _keep(self, adapter: Adapter) -> None:
        """One served from a folder: a run finds what it begins from by its digest alone."""
        with self._registry.store.keep(adapter):
            pass


def _name_of_base(adapter: Adapter) -> str:
    """What the store calls the base an adapter was made for: runs know bases by name, never by path."""
    named = next((name for name, base in list_bases() if base.ref.fingerprint == adapter.base.fingerprint), None)
    if named is None:
        raise UsageError(f"{adapter.base} is not among this machine's bases: `adapterhub base pull` puts it there.")
    return named
