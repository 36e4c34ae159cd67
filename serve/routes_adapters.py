"""HTTP of the adapters this machine keeps: list, inspect, verify, pull. What they are is the registry's to say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, params
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import UsageError
from adapterhub.registry import DEFAULT_REVISION, Entry, Registry
from serve.catalog import Catalog


class RefBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    ref: str = Field(min_length=1, max_length=500)


def adapter_routes(
    registry: Registry, catalog: Catalog, asking: Sequence[params.Depends], managing: Sequence[params.Depends]
) -> APIRouter:
    """The routes below /v1/adapters; `asking` lets clients read, `managing` administrators act."""
    router = APIRouter(prefix="/v1/adapters")

    @router.get("", dependencies=asking)
    async def list_adapters(search: str = "", base: str = "") -> Response:
        entries = await asyncio.to_thread(registry.list)
        served = {published.adapter.digest: published.name for published in catalog.list()}
        found = [_row(entry, served) for entry in entries]
        wanted = [row for row in found if _holds(row["name"], search) and _holds(row["base"], base)]
        return JSONResponse({"data": wanted})

    @router.get("/inspect", dependencies=asking)
    async def inspect(ref: str) -> Response:
        return JSONResponse(_described(await asyncio.to_thread(_local, registry, ref)))

    @router.post("/verify", dependencies=managing)
    async def verify(body: RefBody) -> Response:
        adapter = await asyncio.to_thread(_local, registry, body.ref)
        return JSONResponse({"name": adapter.manifest.name, "digest": adapter.digest})

    @router.post("/pull", dependencies=managing)
    async def pull(body: RefBody) -> Response:
        if registry.hub is None:
            raise UsageError("this server knows no Hub: start it with --hub URL.")
        adapter = await asyncio.to_thread(registry.pull, AdapterRef.parse(body.ref), registry.hub)
        return JSONResponse({"name": adapter.manifest.name, "digest": adapter.digest}, status_code=201)

    return router


def _local(registry: Registry, text: str) -> Adapter:
    """A verified package that is here already: reading must not make the server fetch. Raises UsageError for paths."""
    ref = AdapterRef.parse(text)
    if ref.folder is not None:
        raise UsageError(f"{text} is a path on the server's disk, which clients may not choose: name an adapter.")
    return Registry(registry.root).resolve(ref)


def _row(entry: Entry, served: dict[str, str]) -> dict[str, Any]:
    is_default = entry.revision == DEFAULT_REVISION
    return {
        "name": entry.name if is_default else f"{entry.name}@{entry.revision}",
        "revision": entry.revision,
        "aliases": [],
        "digest": entry.digest,
        "base": entry.about.base,
        "rank": entry.about.rank,
        "method": entry.about.method,
        "licence": entry.about.licence,
        "loaded_as": served.get(entry.digest),
    }


def _described(adapter: Adapter) -> dict[str, Any]:
    manifest = adapter.manifest
    return {
        "name": manifest.name,
        "digest": adapter.digest,
        "base": {"id": manifest.base.id, "revision": manifest.base.revision, "fingerprint": manifest.base.fingerprint},
        "lora": manifest.lora.model_dump(mode="json"),
        "licence": manifest.licence,
        "evaluations": [evaluation.model_dump(mode="json") for evaluation in manifest.evaluations],
        "has_proof": manifest.probe is not None,
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def _holds(text: str, part: str) -> bool:
    return part.lower() in text.lower()
