"""Candidates: runs that train from feedback, published and promoted through the registry and the catalog."""

from __future__ import annotations

import asyncio
import tomllib
from contextlib import ExitStack

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.bases.store import list_bases
from adapterhub.errors import AdapterNotFound, Conflict, UsageError
from adapterhub.feedback.improvement import Improvement
from adapterhub.feedback.store import FeedbackStore
from adapterhub.package.layout import open_adapter
from adapterhub.registry.policy import Policy
from adapterhub.registry.registry import DEFAULT_REVISION, NOTHING, Registry
from serve.adapters.catalog import Catalog, clients_ref
from serve.training.runs import TrainingRun, TrainingRuns


class CandidatePipeline:
    """Train a candidate from feedback, publish it, promote it. Belongs to the event loop."""

    def __init__(self, runs: TrainingRuns, feedback: FeedbackStore, registry: Registry, catalog: Catalog) -> None:
        self._runs = runs
        self._feedback = feedback
        self._registry = registry
        self._catalog = catalog

    async def improve(self, ref: str, improvement: Improvement) -> TrainingRun:
        """Start a run from all feedback on an adapter that is served or in the registry.

        Raises UsageError, AdapterNotFound, TrainingBusy.
        """
        served = {published.name: published.adapter for published in self._catalog.list()}
        adapter = served[ref] if ref in served else await asyncio.to_thread(self._stored, ref)
        if not await asyncio.to_thread(self._feedback.counts):
            raise UsageError(
                "there is no feedback to train from: expected votes with a winner, or corrections. Rate answers first."
            )
        base = await asyncio.to_thread(_name_of_base, adapter)
        recipe = improvement.recipe(adapter, base=base)
        with ExitStack() as lease:  # one served from a folder is stored: a run finds its start by digest alone
            try:
                await asyncio.to_thread(self._keep, adapter, lease)
            except FileNotFoundError as error:
                raise AdapterNotFound(
                    f"{adapter.path}, from which {ref} is served, has lost files: expected a complete package. Restore "
                    "them, or load another adapter."
                ) from error
            improves = await asyncio.to_thread(self._name_of, adapter)
            return await self._runs.start(recipe, improves=improves)

    async def publish(self, name: str, *, by: str | None = None) -> str:
        """Pack the adapter of a run, store it, and serve it. Return the name it is served under.

        Raises TrainingRunNotFound, UsageError for a run that is not complete, SignatureInvalid, and what packing and
        loading raise. The registry's name is moved last, so that it never points to an adapter that cannot be loaded.
        """
        adapter = await self._packed(name)
        called = f"{adapter.manifest.name}-{name.rpartition('-')[2]}"
        with ExitStack() as lease:
            await asyncio.to_thread(self._keep, adapter, lease, called)
            await self._catalog.load(called, AdapterRef(digest=adapter.digest), replace=True)
            await asyncio.to_thread(self._registry.add, adapter, name=called, by=by)
        return called

    async def promote(self, name: str, *, by: str | None = None) -> str:
        """Point the name of the improved adapter to the candidate, and serve the candidate in its place.

        Raises as publish does, UsageError for a run that improves no adapter, and Conflict for a name that points to
        another adapter than the run started from.
        """
        run = await asyncio.to_thread(self._runs.get, name)
        if run.improves is None:
            raise UsageError(
                f"run {name} improves no adapter: expected a run from feedback. Publish it under a name of its own."
            )
        adapter = await self._packed(name)
        before = tomllib.loads(run.recipe).get("start")
        expect = await asyncio.to_thread(self._expected, run.improves, before, adapter)
        with ExitStack() as lease:
            await asyncio.to_thread(self._keep, adapter, lease, run.improves)
            for published in self._catalog.list():
                if published.adapter.digest == before:
                    await self._catalog.load(
                        published.name, AdapterRef(digest=adapter.digest), replace=True,
                        weight=published.weight, is_pinned=published.is_pinned,
                    )  # fmt: skip
            await asyncio.to_thread(self._registry.add, adapter, name=run.improves, expect=expect, by=by)
        return run.improves

    async def _packed(self, name: str) -> Adapter:
        await self._runs.pack(name)
        return await asyncio.to_thread(open_adapter, self._runs.folder / name)

    def _name_of(self, adapter: Adapter) -> str:
        """Return the adapter's name in the registry, which may differ from the served one."""
        kept = (entry for entry in self._registry.list() if entry.digest == adapter.digest)
        names = [entry.name for entry in kept if entry.revision == DEFAULT_REVISION]
        return names[0] if names else adapter.manifest.name

    def _stored(self, text: str) -> Adapter:
        return Registry(self._registry.root).resolve(clients_ref(text))

    def _expected(self, name: str, before: str | None, after: Adapter) -> str:
        """Return the digest that `name` points to, or NOTHING. Raises Conflict where it may not move to `after`."""
        known = self._registry.log.read(name)
        there = known.leads_to(DEFAULT_REVISION) if known else None
        if there not in (None, before, after.digest):
            raise Conflict(
                f"{name} points to {there[:19]}: expected {str(before)[:19]}, which the run started from. Publish the "
                "candidate under a name of its own."
            )
        return there or NOTHING

    def _keep(self, adapter: Adapter, lease: ExitStack, name: str | None = None) -> None:
        """Store it, safe from garbage collection until `lease` ends. Raises SignatureInvalid by `name`'s policy."""
        kept = lease.enter_context(self._registry.store.keep(adapter))
        if name is not None:
            Policy.read(self._registry.root).check(kept, name)


def _name_of_base(adapter: Adapter) -> str:
    """Return the name of the adapter's base in the store: a client's recipe may have no path."""
    named = next((name for name, base in list_bases() if base.ref.fingerprint == adapter.base.fingerprint), None)
    if named is None:
        raise UsageError(f"base {adapter.base} is not on this machine: training needs it. Run 'adapterhub base pull'.")
    return named
