"""What a server's training runs begin from and what becomes of them: feedback before, registry and names after."""

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
        with ExitStack() as lease:  # one served from a folder is kept: a run finds its beginning by the digest alone
            try:
                await asyncio.to_thread(self._keep, adapter, lease)
            except FileNotFoundError as error:
                raise AdapterNotFound(
                    f"{adapter.path}, from which {ref} is served, is no longer whole: put it back, or load another."
                ) from error
            improves = await asyncio.to_thread(self._name_of, adapter)
            return await self._runs.start(recipe, improves=improves)

    async def publish(self, name: str, *, by: str | None = None) -> str:
        """Pack what a run made, keep it, and let it answer beside the others. Returns the name it answers to.

        Raises TrainingRunNotFound, UsageError for a run that is not complete, SignatureInvalid, and what packing and
        loading raise; the name is led there last, so that none leads to what could not be loaded.
        """
        adapter = await self._packed(name)
        called = f"{adapter.manifest.name}-{name.rpartition('-')[2]}"
        with ExitStack() as lease:
            await asyncio.to_thread(self._keep, adapter, lease, called)
            await self._catalog.load(called, AdapterRef(digest=adapter.digest), replace=True)
            await asyncio.to_thread(self._registry.add, adapter, name=called, by=by)
        return called

    async def promote(self, name: str, *, by: str | None = None) -> str:
        """Let the name that an improvement began from lead to its result, here and wherever it is served.

        Raises as publish does, UsageError for a run that improves nothing, and Conflict for a name that leads to
        something else than the run began from.
        """
        run = await asyncio.to_thread(self._runs.get, name)
        if run.improves is None:
            raise UsageError(f"run {name} began from no adapter: publish it under a name of its own.")
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
        """What the registry calls it, under whatever name it is served."""
        kept = (entry for entry in self._registry.list() if entry.digest == adapter.digest)
        names = [entry.name for entry in kept if entry.revision == DEFAULT_REVISION]
        return names[0] if names else adapter.manifest.name

    def _kept(self, text: str) -> Adapter:
        return Registry(self._registry.root).resolve(clients_ref(text))

    def _expected(self, name: str, before: str | None, after: Adapter) -> str:
        """Where `name` leads, if it may be led from there to `after`. Raises Conflict."""
        known = self._registry.log.read(name)
        there = known.leads_to(DEFAULT_REVISION) if known else None
        if there not in (None, before, after.digest):
            raise Conflict(
                f"{name} leads to {there[:19]}, not to {str(before)[:19]} that the run began from: publish the result "
                "under a name of its own."
            )
        return there or NOTHING

    def _keep(self, adapter: Adapter, lease: ExitStack, name: str | None = None) -> None:
        """No collection takes it until `lease` ends. Raises SignatureInvalid where it may not be used as `name`."""
        kept = lease.enter_context(self._registry.store.keep(adapter))
        if name is not None:
            Policy.read(self._registry.root).check(kept, name)


def _name_of_base(adapter: Adapter) -> str:
    """What the store calls the base an adapter was made for: runs know bases by name, never by path."""
    named = next((name for name, base in list_bases() if base.ref.fingerprint == adapter.base.fingerprint), None)
    if named is None:
        raise UsageError(f"{adapter.base} is not among this machine's bases: `adapterhub base pull` puts it there.")
    return named
