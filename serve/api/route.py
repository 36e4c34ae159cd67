"""The order of work on a request: rights and headers, then the body within its limits, then the route."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute

from adapterhub.errors import WrongContentType
from serve.api.access import ACCESS, JSON, Access, Right
from serve.api.auth import ApiKeys
from serve.api.body import BodyPermit, BodyReader, has_body, parse_json
from serve.api.lanes import INLINE_SIZE, Lanes

_JSON_BASED = re.compile(r"application/[a-z0-9!#$&^_.+-]+\+json")
"""Pattern of a media type that is JSON-based (RFC 6838, sections 4.2 and 4.2.8)."""


class BodyField(Protocol):
    """FastAPI's description of a route's body."""

    def validate(self, value: Any, values: dict[str, Any], *, loc: tuple[str, ...]) -> tuple[Any, list[dict[str, Any]]]:
        """Return the body as the route takes it, and the validation errors."""


class RequestGuard:
    """Checks keys and headers, and reads and parses bodies, for every route."""

    def __init__(self, keys: ApiKeys, bodies: BodyReader, lanes: Lanes) -> None:
        self._keys = keys
        self._bodies = bodies
        self._lanes = lanes

    def check(self, request: Request, access: Access) -> None:
        """Check the headers, and nothing else. Raises InvalidKey, NotAllowed, WrongContentType."""
        if access.right is not Right.OPEN:
            needs_admin = access.right is Right.MANAGE
            self._keys.check(request.headers.get("authorization"), needs_admin=needs_admin)
        if has_body(request) and request.method not in ("GET", "HEAD"):
            _check_type(request, access.body_types)

    async def handle(
        self, request: Request, access: Access, field: BodyField, route: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Return the response of `route` to a request whose body is parsed as `field` describes it."""
        async with self._bodies.permit() as permit:
            body = await self._bodies.read(request, permit)
            if len(body) <= INLINE_SIZE:
                value = _validated(body, field)
            else:
                value = await self._lanes.compute(len(body), _validated, body, field)
            del body
            if not access.keeps_body:
                permit.release()
            return await route(_ReadRequest(request, value, permit))


class ApiRoute(APIRoute):
    """A route of the API. Its path must be in ACCESS; its docstring's first line is its summary in OpenAPI."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        summary, _, description = (inspect.getdoc(endpoint) or "").partition("\n")
        options["summary"] = options.get("summary") or summary.removesuffix(".") or None
        options["description"] = options.get("description") or description.strip()
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Return FastAPI's own handler behind the guard."""
        if self.path not in ACCESS:
            raise LookupError(f"{self.path} has no entry in serve/api/access.py: every route needs one. Add it.")
        access, field, route = ACCESS[self.path], self.body_field, super().get_route_handler()

        async def handle(request: Request) -> Response:
            guard: RequestGuard = request.app.state.guard
            guard.check(request, access)
            return await (route(request) if field is None else guard.handle(request, access, field, route))

        return handle


class _ReadRequest(Request):
    """A request whose body is read, parsed and validated, so that FastAPI does none of it again."""

    def __init__(self, request: Request, value: Any, permit: BodyPermit) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value
        self._permit = permit

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> Any:
        return self._value

    def release_body(self) -> None:
        self._value = None
        self._permit.release()


def release_body(request: Request) -> None:
    """Release the memory of a large body, in routes that run long after they have read it."""
    if isinstance(request, _ReadRequest):
        request.release_body()


def _validated(body: bytearray, field: BodyField) -> Any:
    value, errors = field.validate(parse_json(body), {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return value


def _check_type(request: Request, expected: tuple[str, ...]) -> None:
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise WrongContentType(f"invalid Content-Encoding {coding[:100]!r}: expected none. Send the body uncompressed.")
    essence = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = expected == JSON and _JSON_BASED.fullmatch(essence) is not None
    if essence not in expected and not is_json:
        found = f"invalid Content-Type {essence[:100]!r}" if essence else "the Content-Type is missing"
        types = " or ".join(expected)
        raise WrongContentType(f"{found}: expected {types}. Send the header 'Content-Type: {expected[0]}'.")
