"""Builds everything a server needs, in order, and runs it until told to stop."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable

import torch
import uvicorn
from fastapi.responses import RedirectResponse

from adapterhub.adapter import Adapter
from adapterhub.base_model import load_base
from adapterhub.base_store import find_base
from adapterhub.errors import EngineStopped
from adapterhub.listening import listen, url_of
from adapterhub.registry import Registry
from serve.adapter_cache import AdapterCache
from serve.answer import Services
from serve.api import create_app
from serve.auth import ApiKeys, check_exposure
from serve.catalog import Catalog
from serve.config import ServeConfig
from serve.cpu_kernels import load_kernels
from serve.engine import Engine
from serve.local_engine import LocalEngine
from serve.metrics import Metrics
from serve.prompt import PromptRenderer
from serve.proof import replay

Report = Callable[[str], None]


def run_server(config: ServeConfig, registry: Registry, keys: ApiKeys, *, report: Report) -> None:
    """Serve until SIGINT or SIGTERM. Every adapter given must load, or nothing starts.

    Raises UsageError for an open interface without keys, PortBusy, BaseNotFound, and what loading raises.
    """
    check_exposure(config.host, keys)
    with listen(config.host, config.port) as listener:
        asyncio.run(_serve(config, registry, keys, listener, report))


async def _serve(
    config: ServeConfig, registry: Registry, keys: ApiKeys, listener: socket.socket, report: Report
) -> None:
    services = _build(config, registry, report)
    try:
        for name, ref in config.adapters:
            published = await services.catalog.load(
                name, ref, weight=config.weights.get(name, 1.0), is_pinned=name in config.pinned, may_wait=True
            )
            is_resident = published.adapter.digest in services.cache.resident
            report(
                f"adapter {name}: {published.adapter.digest[:19]} ({ref}){'' if is_resident else ', loaded when asked'}"
            )
        app, url = create_app(services, keys), url_of(listener)
        if config.has_page:
            from serve.ui import mount_page

            mount_page(app, url, needs_key=keys.are_required)
            app.get("/", include_in_schema=False)(lambda: RedirectResponse("/ui"))
        gc.collect()
        gc.freeze()  # the model stays: full collections that walk it cost a lone stream some 4 % of its speed
        report(f"ready: {url}/v1" + (f", page {url}/ui" if config.has_page else ""))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        watch = asyncio.create_task(_end_with_engine(services.engine, server))
        await server.serve(sockets=[listener])
        watch.cancel()
        status = services.engine.status()
        if not status.ready:
            raise EngineStopped(f"the engine has stopped ({status.reason}): its log says more; start the server again.")
    finally:
        await services.engine.close()


async def _end_with_engine(engine: Engine, server: uvicorn.Server) -> None:
    """A server without its engine only refuses: once its clients were told, it ends, to be started again."""
    while engine.status().ready:
        await asyncio.sleep(1)
    server.should_exit = True


def _build(config: ServeConfig, registry: Registry, report: Report) -> Services:
    """Load the base and start the engine; everything else hangs on these two."""
    stored = find_base(config.base)
    dtype = config.dtype or _kernels_dtype(config.device)
    base = load_base(stored, purpose="serve", dtype=dtype, device=config.device)
    for choice in base.choices:
        report(str(choice))
    engine = LocalEngine(base, config.engine)
    for choice in engine.choices:
        report(str(choice))
    proven: set[str] = set()

    async def load(adapter: Adapter) -> None:
        await engine.load(adapter)
        if not config.replays_proofs or adapter.digest in proven:
            return
        try:
            await replay(engine, adapter)
        except BaseException:
            await engine.unload(adapter.digest)
            raise
        proven.add(adapter.digest)

    cache = AdapterCache(config.max_loras, load=load, unload=engine.unload, max_bytes=config.max_lora_bytes)
    catalog = Catalog(stored, config.base_name, registry, cache)
    return Services(engine, catalog, cache, PromptRenderer(base.tokenizer), Metrics(engine))


def _kernels_dtype(device: str | None) -> str | None:
    """fp32 where our CPU kernels, which compute in it, will run; None where the base is to choose."""
    is_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return "float32" if is_cpu and load_kernels()[0] is not None else None
