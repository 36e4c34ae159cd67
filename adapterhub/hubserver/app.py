"""The ASGI application of the hub server: its services, its routes, and how errors become responses."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.errors import AdapterHubError
from adapterhub.files import make_folder
from adapterhub.hubserver.auth.audit import AuditLog, AuditMiddleware
from adapterhub.hubserver.auth.tickets import Signer
from adapterhub.hubserver.auth.tokens import Tokens, load_or_create_secret
from adapterhub.hubserver.errors import HubServerError
from adapterhub.hubserver.routes import commits, discussions, files, gated_access, lfs, pages, refs, repos, xet_upload
from adapterhub.hubserver.routes.dependencies import READ, HubServices
from adapterhub.hubserver.storage.catalog import RepoCatalog
from adapterhub.hubserver.storage.discussion_store import DiscussionStore
from adapterhub.hubserver.storage.quotas import Limits, Quotas
from adapterhub.hubserver.storage.store import HubStore
from adapterhub.hubserver.xet.xorb_store import XorbStore

MAX_JSON_BYTES = 8 << 20
"""Maximum body of a request that carries no files, in bytes."""


def create_hub_app(
    root: Path, tokens: Tokens, *, public_url: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """Return the application that serves the folder `root`, which is created if it does not exist.

    `public_url`: the server's address as clients see it, if a proxy stands in front.
    Every request that can change something is recorded in `root/audit.jsonl`.
    """
    make_folder(root)
    store = HubStore(root)
    app = FastAPI(
        title="adapterhub hub",
        openapi_url=None,
        redirect_slashes=False,
        max_body_size=MAX_JSON_BYTES,
        exception_handlers={
            AdapterHubError: _on_error,
            RequestValidationError: _on_invalid_request,
            ClientDisconnect: _on_disconnect,
        },
    )
    app.state.hub = HubServices(
        store=store,
        catalog=RepoCatalog(store),
        discussions=DiscussionStore(store),
        quotas=Quotas(store, root, limits or Limits()),
        xet=XorbStore(root, store.objects),
        tokens=tokens,
        signer=Signer(load_or_create_secret(root / "upload.secret")),
        public_url=public_url,
    )
    app.add_middleware(_RawPathRouting)
    app.add_middleware(AuditMiddleware, log=AuditLog(root / "audit.jsonl"))
    app.add_api_route("/health", _health, methods=READ)
    # In this order: the addresses of files and pages also match what is above them.
    for module in (repos, refs, discussions, gated_access, commits, lfs, xet_upload, files, pages):
        app.include_router(module.router)
    return app


def _health() -> dict[str, str]:
    return {"status": "ok"}


class _RawPathRouting:
    """Middleware that routes on the percent-encoded path, so that a branch `a/b` (`a%2Fb`) is one path segment."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        await self._app(scope, receive, send)


def _error_response(status: int, message: str, *, headers: dict[str, str]) -> JSONResponse:
    # A header value is one line of ASCII.
    escaped = message.encode("unicode_escape").decode("ascii")
    return JSONResponse({"error": message}, status_code=status, headers={"X-Error-Message": escaped, **headers})


async def _on_error(request: Request, error: AdapterHubError) -> JSONResponse:
    headers = error.headers if isinstance(error, HubServerError) else {}
    return _error_response(error.http_status, str(error), headers=headers)


async def _on_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return _error_response(400, f"invalid request: {faults}", headers={})


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Answer a client that disconnected during an upload: nobody reads the response, but the log gets no traceback."""
    return Response(status_code=400)
