"""The server process: create the services, load the adapters, and serve until stopped."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Callable
from dataclasses import replace

import uvicorn
from fastapi.responses import RedirectResponse

from adapterhub.bases.store import find_base
from adapterhub.errors import EngineStopped
from adapterhub.feedback.store import STORE_NAME, FeedbackStore
from adapterhub.net import listen, url_of
from adapterhub.paths import home
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.adapters.catalog import Catalog
from serve.adapters.probe import ProbedLoader
from serve.api.app import create_app
from serve.api.auth import ApiKeys, check_exposure
from serve.api.metrics import Metrics
from serve.api.prompts import PromptRenderer
from serve.api.services import Services
from serve.config import ServeConfig
from serve.engine import Engine
from serve.engine_choice import start_engine
from serve.local_engine.cpu.memory import trim_heap
from serve.training.runs import TrainingRuns

Report = Callable[[str], None]
SWITCH_S = 0.0005
"""Time after which a waiting thread gets the interpreter's lock, in seconds.

A step of the engine needs the lock dozens of times; Python's default of 5 ms would delay every token.
"""


def run_server(config: ServeConfig, registry: Registry, keys: ApiKeys, *, report: Report) -> None:
    """Serve until SIGINT or SIGTERM. Start only where every given adapter loads.

    Raises UsageError for an open interface without keys, PortBusy, BaseNotFound, and what loading raises.
    """
    check_exposure(config.host, keys)
    with listen(config.host, config.port) as listener:
        asyncio.run(_serve(config, registry, keys, listener, report))


async def _serve(
    config: ServeConfig, registry: Registry, keys: ApiKeys, listener: socket.socket, report: Report
) -> None:
    services = replace(
        await build_services(config, registry, report=report),
        training=TrainingRuns(home() / "training"),
        feedback=FeedbackStore(home() / STORE_NAME),
    )
    try:
        for name, ref in config.adapters:
            published = await services.catalog.load(
                name, ref, weight=config.weights.get(name, 1.0), is_pinned=name in config.pinned, may_wait=True
            )
            is_resident = published.adapter.digest in services.cache.resident
            note = "" if is_resident else ", loaded on its first request"
            report(f"adapter {name}: {published.adapter.digest[:19]} ({ref}){note}")
        app, url = create_app(services, keys, config.http), url_of(listener)
        if config.has_page:
            from serve.ui.app import mount_page

            mount_page(app, url, needs_key=keys.are_required, max_body_bytes=config.http.max_body_bytes)
            app.get("/", include_in_schema=False)(lambda: RedirectResponse("/ui"))
        gc.collect()
        trim_heap()
        sys.setswitchinterval(SWITCH_S)
        gc.freeze()  # the model stays: full collections over it cost a single stream some 4 % of its speed
        report(f"ready: {url}/v1" + (f", page {url}/ui" if config.has_page else ""))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        watch = asyncio.create_task(_end_with_engine(services.engine, server))
        await server.serve(sockets=[listener])
        watch.cancel()
        status = services.engine.status()
        if status.has_ended:
            raise EngineStopped(
                f"the engine stopped ({status.reason}): the server cannot continue. See the log, and start it again."
            )
    finally:
        await services.engine.close()


async def _end_with_engine(engine: Engine, server: uvicorn.Server) -> None:
    """Stop the server when its engine has ended: it could only refuse requests."""
    while not engine.status().has_ended:
        await asyncio.sleep(1)
    server.should_exit = True


async def build_services(config: ServeConfig, registry: Registry, *, report: Report) -> Services:
    """Start the engine on its base, and create the services on it."""
    stored = find_base(config.base)
    engine, tokenizer = await start_engine(config, stored, registry, report=report)
    loader = ProbedLoader(engine, replays=config.replay_probe, report=report)
    # Running vLLM servers were not started with our --max-num-seqs, and may take more at once.
    max_leases = None if config.vllm.endpoints else config.engine.limits.max_num_seqs
    cache = AdapterCache(
        config.max_loras, load=loader.load, unload=engine.unload, max_bytes=config.max_lora_bytes,
        size_of=engine.size_of, max_leases=max_leases,
    )  # fmt: skip
    catalog = Catalog(stored, config.base_name, registry, cache)
    return Services(engine, catalog, cache, PromptRenderer(tokenizer), Metrics(engine), registry=registry)
