"""The HTTP API: OpenAI's routes, error responses, and aborting the request of a client that disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from adapterhub.adapter import AdapterRef
from adapterhub.browser_guard import BrowserGuard
from adapterhub.errors import AdapterHubError, SiteNotAllowed, UsageError
from adapterhub.version import __version__
from serve.adapters.catalog import Published
from serve.api import schemas
from serve.api.adapters import adapter_routes
from serve.api.auth import ApiKeys
from serve.api.body import BodyReader, ClientGone
from serve.api.completions import (
    UNEXPECTED,
    PreparedRequest,
    completion_events,
    completion_response,
    prepare_chat,
    prepare_completion,
)
from serve.api.feedback import feedback_routes
from serve.api.metrics import Metrics
from serve.api.route import ApiRoute, RequestGuard, release_body
from serve.api.services import Services
from serve.api.training import training_routes
from serve.api.unread_body import UnreadBody
from serve.api.validation_errors import described
from serve.config import HttpLimits
from serve.training.candidates import CandidatePipeline

log = logging.getLogger(__name__)

_CLIENT_GONE = 499
"""HTTP status for a client that disconnected, as in nginx; it appears in logs only."""


def create_app(services: Services, keys: ApiKeys, http: HttpLimits | None = None) -> FastAPI:
    """Return the API over services that are ready."""
    http = http or HttpLimits()
    app = FastAPI(title="adapterhub", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = ApiRoute
    bodies = BodyReader(max_bytes=http.max_body_bytes, max_tokens=services.engine.max_model_len)
    app.state.guard = RequestGuard(keys, bodies, services.prompts.lanes)
    refuse = _Refusals(services.metrics)
    app.add_middleware(
        BrowserGuard,
        is_open=not keys.are_required,
        allowed_hosts=http.allowed_hosts,
        refuse=lambda message: refuse(SiteNotAllowed.http_status, SiteNotAllowed.code, message),
    )
    app.add_middleware(UnreadBody)

    @app.get("/health")
    async def health() -> Response:
        """Report that the process responds.

        Whether it can generate is /ready.
        """
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Report whether the server can generate, with the reason where it cannot."""
        status = services.engine.status()
        body = {"ready": status.ready, "reason": status.reason, "adapters": [p.name for p in services.catalog.list()]}
        return JSONResponse(body, status_code=200 if status.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        services.metrics.resident.set(len(services.cache.resident))
        services.metrics.published.set(len(services.catalog.list()))
        return Response(services.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        """List the base and the served adapters."""
        cards = [_base_card(services), *(_adapter_card(services, published) for published in services.catalog.list())]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Return one model: the base or a served adapter."""
        published = services.catalog.find(name)
        return JSONResponse(_adapter_card(services, published) if published else _base_card(services))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: schemas.ChatRequest) -> Response:
        """Create a chat completion."""
        return await _respond(services, request, body, prepare_chat(services, body))

    @app.post("/v1/completions")
    async def completions(request: Request, body: schemas.CompletionRequest) -> Response:
        """Create a text completion."""
        return await _respond(services, request, body, prepare_completion(services, body))

    @app.post("/v1/load_lora_adapter")
    async def load(body: schemas.LoadRequest) -> Response:
        """Load an adapter and serve it under a name."""
        ref = AdapterRef.parse(body.lora_path)
        if ref.folder is not None:
            raise UsageError(
                f"invalid lora_path {body.lora_path!r}: expected a registry name, a digest, or owner/name on the Hub, "
                "not a path on the server's disk. Run 'adapterhub add' there and load it by name, or push it to a Hub."
            )
        published = await services.catalog.load(body.lora_name, ref, replace=body.load_inplace)
        return PlainTextResponse(
            f"Success: LoRA adapter '{published.name}' added successfully.",
            headers={"x-adapter-digest": published.adapter.digest},
        )

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: schemas.UnloadRequest) -> Response:
        """Stop serving an adapter."""
        services.catalog.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    if services.registry is not None:
        app.include_router(adapter_routes(services.registry, services.catalog))
    if services.feedback is not None:
        app.include_router(feedback_routes(services.feedback, lambda names: _served(services, names)))
    if services.training is not None:
        app.include_router(training_routes(services.training, _candidates(services)))
    _add_error_handlers(app, refuse)
    return app


def _candidates(services: Services) -> CandidatePipeline | None:
    if services.training is None or services.feedback is None or services.registry is None:
        return None
    return CandidatePipeline(services.training, services.feedback, services.registry, services.catalog)


def _served(services: Services, names: list[str] | None) -> list[str]:
    """Return the names, or without any the base and every adapter. Raises AdapterNotFound for one not served."""
    if names is None:
        return [services.catalog.base_name, *(published.name for published in services.catalog.list())]
    for name in names:
        services.catalog.find(name)
    return names


async def _respond(
    services: Services,
    request: Request,
    body: schemas.ChatRequest | schemas.CompletionRequest,
    preparation: Awaitable[PreparedRequest],
) -> Response:
    prepared: PreparedRequest = await _while_connected(request, preparation)
    release_body(request)
    headers = {"x-request-id": prepared.id}
    if not body.stream:
        return JSONResponse(await _while_connected(request, completion_response(services, prepared)), headers=headers)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    events = completion_events(services, prepared, include_usage=include_usage)
    # Waiting for the first event here lets every error before it keep its HTTP status.
    first = await _while_connected(request, anext(events))
    return StreamingResponse(_resumed(first, events), media_type="text/event-stream", headers=headers)


async def _resumed(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()


async def _while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """Await `work`. If the client disconnects first, cancel it, which aborts the generation, and raise ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _base_card(services: Services) -> dict[str, Any]:
    base = services.catalog.base.ref
    return {
        "id": services.catalog.base_name,
        "object": "model",
        "created": services.catalog.since,
        "owned_by": "adapterhub",
        "root": base.id,
        "parent": None,
        "max_model_len": services.engine.max_model_len,
        "fingerprint": base.fingerprint,
        "precision": str(services.engine.precision),
    }


def _adapter_card(services: Services, published: Published) -> dict[str, Any]:
    manifest = published.adapter.manifest
    return {
        "id": published.name,
        "object": "model",
        "created": published.since,
        "owned_by": "adapterhub",
        "root": published.name,
        "parent": services.catalog.base_name,
        "max_model_len": services.engine.max_model_len,
        "digest": published.adapter.digest,
        "lora": {"method": manifest.lora.method, "rank": manifest.lora.rank, "alpha": manifest.lora.alpha},
        "license": manifest.license,
        "licence": manifest.license,  # the old name, for one version
        "evaluations": [evaluation.model_dump() for evaluation in manifest.evaluations],
    }


class _Refusals:
    """Makes OpenAI's error responses, and counts them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __call__(self, status: int, code: str, message: str, param: str | None = None) -> Response:
        self._metrics.refused.labels(code).inc()
        kind = schemas.kind_of_error(status)
        body = schemas.error_body(_encodable(message), code=code, kind=kind, param=param and _encodable(param))
        return JSONResponse(body, status_code=status, headers=_retry_headers(status))


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _add_error_handlers(app: FastAPI, refuse: _Refusals) -> None:
    @app.exception_handler(AdapterHubError)
    async def on_known(request: Request, error: AdapterHubError) -> Response:
        param = "model" if error.code == "model_not_found" else None
        return refuse(error.http_status, error.code, str(error), param)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(400, "invalid_request", *described(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        return refuse(error.status_code, "not_found" if error.status_code == 404 else "bad_request", str(error.detail))

    @app.exception_handler(ClientGone)
    async def on_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def on_unknown(request: Request, error: Exception) -> Response:
        log.exception("unexpected error", exc_info=error)
        return refuse(500, "internal_error", UNEXPECTED)


def _retry_headers(status: int) -> dict[str, str]:
    """Return headers that tell OpenAI's client, which retries 408, 409, 429 and 5xx, whether a retry can help."""
    if status == 429:
        return {"retry-after": "1"}
    return {"x-should-retry": "false"} if status in (408, 409) or status >= 500 else {}
