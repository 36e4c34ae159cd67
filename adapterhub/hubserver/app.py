"""The hub as one application: what the routes are given, how refusals travel, which path is routed.

Starts no server.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.errors import AdapterHubError
from adapterhub.hubserver.auth.audit import Audited, AuditLog
from adapterhub.hubserver.auth.tickets import Signer
from adapterhub.hubserver.auth.tokens import Tokens, kept_secret
from adapterhub.hubserver.errors import Refusal
from adapterhub.hubserver.routes import commits as routes_uploads
from adapterhub.hubserver.routes import discussions as routes_discussions
from adapterhub.hubserver.routes import files as routes_files
from adapterhub.hubserver.routes import gated_access as routes_gates
from adapterhub.hubserver.routes import lfs as routes_lfs
from adapterhub.hubserver.routes import pages
from adapterhub.hubserver.routes import refs as routes_refs
from adapterhub.hubserver.routes import repos as routes_repos
from adapterhub.hubserver.routes import xet as routes_xet
from adapterhub.hubserver.routes.dependencies import READ, Hub
from adapterhub.hubserver.storage.catalog import Catalog
from adapterhub.hubserver.storage.discussions import Discussions
from adapterhub.hubserver.storage.quotas import Limits, Quotas
from adapterhub.hubserver.storage.store import HubStore
from adapterhub.hubserver.xet.store import XetStore

MAX_JSON_BYTES = 8 << 20
"""of a request without files"""


def create_hub_app(
    root: Path, tokens: Tokens, *, public_url: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """A Hub-compatible server over the folder `root`, which is made when missing.

    `public_url`: the address clients use, when it differs from the one requests name (a proxy).
    What changes anything is noted in `root/audit.jsonl`.
    """
    root.mkdir(parents=True, exist_ok=True)
    store = HubStore(root)
    app = FastAPI(
        title="adapterhub hub",
        openapi_url=None,
        redirect_slashes=False,
        max_body_size=MAX_JSON_BYTES,
        exception_handlers={
            AdapterHubError: _say_error,
            RequestValidationError: _say_bad_request,
            ClientDisconnect: _say_nothing,
        },
    )
    app.state.hub = Hub(
        store=store,
        catalog=Catalog(store),
        discussions=Discussions(store),
        quotas=Quotas(store, root, limits or Limits()),
        xet=XetStore(root, store.objects),
        tokens=tokens,
        signer=Signer(kept_secret(root / "upload.secret")),
        public_url=public_url,
    )
    app.add_middleware(_RawPathRouting)
    app.add_middleware(Audited, log=AuditLog(root / "audit.jsonl"))
    app.add_api_route("/health", _health, methods=READ)
    for routes in (
        routes_repos,
        routes_refs,
        routes_discussions,
        routes_gates,
        routes_uploads,
        routes_lfs,
        routes_xet,
        routes_files,
        pages,
    ):
        app.include_router(routes.router)
    return app


def _health() -> dict[str, str]:
    return {"status": "ok"}


class _RawPathRouting:
    """Routes on the path as it was sent: decoded, a branch named `a/b` could not be told from two parts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("ascii")}
        await self._app(scope, receive, send)


def _error_reply(status: int, message: str, *, headers: dict[str, str]) -> JSONResponse:
    # A header carries one line of plain ASCII.
    said = message.encode("unicode_escape").decode("ascii")
    return JSONResponse({"error": message}, status_code=status, headers={"X-Error-Message": said, **headers})


async def _say_error(request: Request, error: AdapterHubError) -> JSONResponse:
    headers = error.headers if isinstance(error, Refusal) else {}
    return _error_reply(error.http_status, str(error), headers=headers)


async def _say_bad_request(request: Request, error: RequestValidationError) -> JSONResponse:
    faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return _error_reply(400, f"the request is not understood: {faults}", headers={})


async def _say_nothing(request: Request, error: ClientDisconnect) -> Response:
    """Whoever hung up in the middle of an upload hears no answer, and the log needs no traceback for it."""
    return Response(status_code=400)
