"""HTTP routes below /v1/adapters: list, inspect, diff, pull, upload, and move aliases of the registry."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import BundleTooLarge, Conflict, UsageError
from adapterhub.feedback.store import actor_of
from adapterhub.files import hold, raise_storage_full
from adapterhub.package.bundle import MAX_BYTES, opened_bundle
from adapterhub.package.diff import difference
from adapterhub.registry.name_log import Move
from adapterhub.registry.registry import DEFAULT_REVISION, NOTHING, Entry, Registry
from adapterhub.strict import Strict
from serve.adapters.catalog import Catalog, clients_ref
from serve.api.body import body_chunks, declared_size
from serve.api.route import ApiRoute

Authorization = Annotated[str | None, Header()]


class RefBody(Strict):
    """Reference to an adapter."""

    ref: str = Field(min_length=1, max_length=500)


class PromoteBody(RefBody):
    """Where to point an alias."""

    alias: str = Field(min_length=1, max_length=100)
    expect: str | None = Field(None, max_length=100)
    """Digest that the alias points to now, or `nothing`; 409 where it does not."""


class RollbackBody(Strict):
    """Which alias to roll back."""

    name: str = Field(min_length=1, max_length=500)
    alias: str = Field(min_length=1, max_length=100)
    expect: str | None = Field(None, max_length=100)
    """Digest that the alias points to now; 409 where it does not."""


def adapter_routes(registry: Registry, catalog: Catalog) -> APIRouter:
    """Return the routes below /v1/adapters."""
    router = APIRouter(prefix="/v1/adapters", route_class=ApiRoute)

    @router.get("")
    async def list_adapters(search: str = "", base: str = "") -> Response:
        """List the adapters of this machine."""
        entries = await asyncio.to_thread(registry.list)
        served: dict[str, list[str]] = {}
        for published in catalog.list():
            served.setdefault(published.adapter.digest, []).append(published.name)
        found = [_row(entry, served.get(entry.digest, [])) for entry in entries]
        wanted = [row for row in found if _holds(row["name"], search) and _holds(row["base"], base)]
        return JSONResponse({"data": wanted})

    @router.get("/inspect")
    async def inspect(ref: str) -> Response:
        """Return the facts of an adapter."""
        return JSONResponse(_described(await asyncio.to_thread(_local, registry, ref)))

    @router.post("/verify")
    async def verify(body: RefBody) -> Response:
        """Verify every file of an adapter."""
        adapter = await asyncio.to_thread(_local, registry, body.ref)
        return JSONResponse({"name": adapter.manifest.name, "digest": adapter.digest})

    @router.get("/diff")
    async def diff(a: str, b: str) -> Response:
        """Compare two adapters."""

        def work() -> dict[str, Any]:
            return asdict(difference(_local(registry, a), _local(registry, b)))

        return JSONResponse(await asyncio.to_thread(work))

    @router.get("/history")
    async def history(name: str) -> Response:
        """List the moves of an adapter's aliases."""
        moves = await asyncio.to_thread(registry.history, name)
        return JSONResponse({"data": [_move(move) for move in moves]})

    _add_imports(router, registry)
    _add_alias_moves(router, registry)
    return router


def _add_imports(router: APIRouter, registry: Registry) -> None:
    @router.post("/pull")
    async def pull(body: RefBody, authorization: Authorization = None) -> Response:
        """Pull an adapter from the server's Hub."""
        if registry.hub is None:
            raise UsageError("this server has no Hub to pull from: expected the option --hub. Start it with --hub URL.")
        by = actor_of(authorization)
        adapter = await asyncio.to_thread(registry.pull, AdapterRef.parse(body.ref), registry.hub, by=by)
        return JSONResponse({"name": adapter.manifest.name, "digest": adapter.digest}, status_code=201)

    @router.post("/upload")
    async def upload(
        request: Request, name: Annotated[str | None, Query(max_length=200)] = None, authorization: Authorization = None
    ) -> Response:
        """Upload a packed folder as one .zip.

        It is stored only where every file is as it was packed.
        """
        registry.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=registry.root, prefix=".pull-") as folder, hold(Path(folder)):
            path = Path(folder) / "package.zip"
            await _receive(request, path)
            adapter = await asyncio.to_thread(_stored, registry, path, name, by=actor_of(authorization))
        return JSONResponse({"name": name or adapter.manifest.name, "digest": adapter.digest}, status_code=201)


def _add_alias_moves(router: APIRouter, registry: Registry) -> None:
    """Add the routes that move aliases of the registry. Served adapters stay as they were loaded."""

    @router.post("/promote")
    async def promote(body: PromoteBody, authorization: Authorization = None) -> Response:
        """Point an alias to an adapter."""
        ref, by = AdapterRef.parse(body.ref), actor_of(authorization)
        return JSONResponse(
            _move(await asyncio.to_thread(registry.promote, ref, body.alias, expect=body.expect, by=by))
        )

    @router.post("/rollback")
    async def rollback(body: RollbackBody, authorization: Authorization = None) -> Response:
        """Point an alias to what it pointed to before."""
        by = actor_of(authorization)
        return JSONResponse(
            _move(await asyncio.to_thread(registry.rollback, body.name, body.alias, expect=body.expect, by=by))
        )


def _move(move: Move) -> dict[str, Any]:
    return {
        "at": move.at.isoformat(),
        "by": move.by,
        "act": move.act,
        "revision": move.revision,
        "before": move.before,
        "after": move.after,
    }


async def _receive(request: Request, path: Path) -> None:
    """Write the body to `path` as it arrives. Raises BundleTooLarge as soon as it is, StorageFull, BodyTimeout."""
    received = 0
    too_large = BundleTooLarge(
        f"the upload is too large: expected at most {MAX_BYTES:,} bytes. Push the adapter to a Hub and pull it."
    )
    if declared_size(request) > MAX_BYTES:
        raise too_large
    with raise_storage_full(path), path.open("wb") as file:
        async for chunk in body_chunks(request):
            received += len(chunk)
            if received > MAX_BYTES:
                raise too_large
            file.write(chunk)


def _stored(registry: Registry, path: Path, name: str | None, *, by: str | None) -> Adapter:
    """Store an uploaded bundle. An upload moves no existing name: raises Conflict. Also raises as `Registry.add`."""
    with opened_bundle(path, path.parent) as adapter:
        called = AdapterRef.parse(name or adapter.manifest.name)
        if called.name is None or called.revision is not None:
            raise UsageError(f"invalid name {name!r} for an upload: expected NAME, without an alias. Send ?name=NAME.")
        known = registry.log.read(called.name)
        target = known.target(DEFAULT_REVISION) if known else None
        if target not in (None, adapter.digest):
            raise Conflict(
                f"{called} points to {target[:19]} already: expected a new name. Send ?name=NAME with another one."
            )
        return registry.add(adapter, name=called.name, origin="upload", expect=target or NOTHING, by=by)


def _local(registry: Registry, text: str) -> Adapter:
    """Return a verified package of this machine: a read must not make the server pull one."""
    return Registry(registry.root).open(clients_ref(text))


def _row(entry: Entry, served: Sequence[str]) -> dict[str, Any]:
    """Describe an entry; `served` are the names under which its adapter is served."""
    is_default = entry.revision == DEFAULT_REVISION
    return {
        "name": entry.name if is_default else f"{entry.name}@{entry.revision}",
        "revision": entry.revision,
        "digest": entry.digest,
        "base": entry.about.base,
        "rank": entry.about.rank,
        "method": entry.about.method,
        "license": entry.about.license,
        "licence": entry.about.license,  # the old name, for one version
        "loaded_as": entry.name if entry.name in served else next(iter(served), None),
    }


def _described(adapter: Adapter) -> dict[str, Any]:
    manifest = adapter.manifest
    return {
        "name": manifest.name,
        "digest": adapter.digest,
        "base": {"id": manifest.base.id, "revision": manifest.base.revision, "fingerprint": manifest.base.fingerprint},
        "lora": manifest.lora.model_dump(mode="json"),
        "license": manifest.license,
        "licence": manifest.license,  # the old name, for one version
        "evaluations": [evaluation.model_dump(mode="json") for evaluation in manifest.evaluations],
        "has_probe": adapter.probe is not None,
        "has_proof": adapter.probe is not None,  # the old name, for one version
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def _holds(text: str, part: str) -> bool:
    return part.lower() in text.lower()
