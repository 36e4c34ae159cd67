"""Candidates: runs that train from feedback, published and promoted through the registry and the catalog."""

from __future__ import annotations

import asyncio
import tomllib
from contextlib import ExitStack

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.bases.store import name_in_store
from adapterhub.errors import AdapterNotFound, UsageError
from adapterhub.feedback.export import training_export
from adapterhub.feedback.improvement import Improvement
from adapterhub.feedback.promotion import Promotion, name_of, names_of
from adapterhub.feedback.store import FeedbackStore
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry
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
        """Start a run from the feedback about an adapter that is served or in the registry.

        Raises UsageError, AdapterNotFound, TrainingBusy.
        """
        served = {published.name: published.adapter for published in self._catalog.list()}
        adapter = served[ref] if ref in served else await asyncio.to_thread(self._stored, ref)
        improves = await asyncio.to_thread(name_of, self._registry, adapter)
        names = [ref, *await asyncio.to_thread(names_of, self._registry, adapter)]
        about = improvement.about(adapter, names)
        await asyncio.to_thread(lambda: training_export(self._feedback.rows(), improvement.method, about=about))
        base = await asyncio.to_thread(_name_of_base, adapter)
        recipe = improvement.recipe(adapter, base=base, names=names)
        with ExitStack() as lease:  # one served from a folder is stored: a run finds its start by digest alone
            try:
                await asyncio.to_thread(self._keep, adapter, lease)
            except FileNotFoundError as error:
                raise AdapterNotFound(
                    f"{adapter.path}, from which {ref} is served, has lost files: expected a complete package. Restore "
                    "them, or load another adapter."
                ) from error
            return await self._runs.start(recipe, improves=improves)

    async def publish(self, name: str, *, by: str | None = None) -> str:
        """Pack what a run made and serve it beside the others under a name of its own. Return that name.

        The name is moved last, so that it never points to what could not be loaded.

        Raises:
            TrainingRunNotFound: there is no such run.
            UsageError: the run is not complete.
            SignatureInvalid, AliasProtected: the trust policy protects the name.
        """
        adapter = await self._packed(name)
        promotion = Promotion(self._registry, f"{adapter.manifest.name}-{name.rpartition('-')[2]}", start=None)
        with ExitStack() as lease:
            await asyncio.to_thread(self._keep, adapter, lease, promotion)
            await self._catalog.load(promotion.name, AdapterRef(digest=adapter.digest), replace=True)
            await asyncio.to_thread(promotion.move, adapter, by=by)
        return promotion.name

    async def promote(self, name: str, *, by: str | None = None) -> str:
        """Move the name that an improvement started from to its candidate, here and wherever it is served.

        Raises:
            UsageError: the run improves nothing, or is not complete.
            Conflict: the name points elsewhere than to what the run started from.
            TrainingRunNotFound, SignatureInvalid, AliasProtected: as `publish`.
        """
        run = await asyncio.to_thread(self._runs.get, name)
        if run.improves is None:
            raise UsageError(
                f"run {name} improves no adapter: expected a run from feedback. Publish it under a name of its own."
            )
        adapter = await self._packed(name)
        start = tomllib.loads(run.recipe).get("start")
        promotion = Promotion(self._registry, run.improves, start)
        with ExitStack() as lease:
            await asyncio.to_thread(self._keep, adapter, lease, promotion)
            for published in self._catalog.list():
                if published.adapter.digest == start:
                    await self._catalog.load(
                        published.name, AdapterRef(digest=adapter.digest), replace=True,
                        weight=published.weight, is_pinned=published.is_pinned,
                    )  # fmt: skip
            await asyncio.to_thread(promotion.move, adapter, by=by)
        return run.improves

    async def _packed(self, name: str) -> Adapter:
        run = await asyncio.to_thread(self._runs.get, name)
        await self._runs.pack(name, license=await asyncio.to_thread(self._license, run))
        return await asyncio.to_thread(open_adapter, self._runs.folder / name)

    def _license(self, run: TrainingRun) -> str | None:
        """Return the license of the adapter that the run started from, while that is kept here."""
        start = tomllib.loads(run.recipe).get("start")
        if run.improves is None or start is None or not self._registry.store.has(start):
            return None
        return self._registry.store.open(start).manifest.license

    def _stored(self, text: str) -> Adapter:
        return Registry(self._registry.root).resolve(clients_ref(text))

    def _keep(self, adapter: Adapter, lease: ExitStack, promotion: Promotion | None = None) -> None:
        """Store the adapter until `lease` ends, at least. Raises as `Promotion.check`."""
        kept = lease.enter_context(self._registry.store.keep(adapter))
        if promotion is not None:
            promotion.check(kept)


def _name_of_base(adapter: Adapter) -> str:
    """Return the name of the adapter's base in the store: a client's recipe may have no path."""
    named = name_in_store(adapter.base)
    if named is None:
        raise UsageError(f"base {adapter.base} is not on this machine: training needs it. Run 'adapterhub base pull'.")
    return named
