"""The order of work on a request: rights and headers, then the body within its limits, then the route itself."""

from __future__ import annotations

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
from serve.api.body import BodyReader, Slot, has_body, parse_json
from serve.api.lanes import INLINE_SIZE, Lanes

_JSON_BASED = re.compile(r"application/[a-z0-9!#$&^_.+-]+\+json")
"""RFC 6838, sections 4.2 and 4.2.8"""


class BodyField(Protocol):
    """What FastAPI knows of a route's body."""

    def validate(self, value: Any, values: dict[str, Any], *, loc: tuple[str, ...]) -> tuple[Any, list[dict[str, Any]]]:
        """The body as the route wants it, or what is wrong with it."""


class Door:
    """What every route shares: the keys, and where bodies are read and parsed."""

    def __init__(self, keys: ApiKeys, bodies: BodyReader, lanes: Lanes) -> None:
        self._keys = keys
        self._bodies = bodies
        self._lanes = lanes

    def check(self, request: Request, access: Access) -> None:
        """Raises InvalidKey, NotAllowed, WrongContentType; looks at nothing but the headers."""
        if access.right is not Right.OPEN:
            needs_admin = access.right is Right.MANAGE
            self._keys.check(request.headers.get("authorization"), needs_admin=needs_admin)
        if has_body(request) and request.method not in ("GET", "HEAD"):
            _check_type(request, access.body_types)

    async def answer(
        self, request: Request, access: Access, field: BodyField, route: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """What `route` answers, given the body as `field` wants it."""
        async with self._bodies.slot() as slot:
            body = await self._bodies.read(request, slot)
            if len(body) <= INLINE_SIZE:
                value = _validated(body, field)
            else:
                value = await self._lanes.compute(len(body), _validated, body, field)
            del body
            if not access.keeps_body:
                slot.free()
            return await route(_ReadRequest(request, value, slot))


class ApiRoute(APIRoute):
    """A route of the API. Its path must be in ACCESS."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's own handler, behind the door."""
        if self.path not in ACCESS:
            raise LookupError(f"{self.path} has no entry in serve/api/access.py: say there who may use it.")
        access, field, route = ACCESS[self.path], self.body_field, super().get_route_handler()

        async def handle(request: Request) -> Response:
            door: Door = request.app.state.door
            door.check(request, access)
            return await (route(request) if field is None else door.answer(request, access, field, route))

        return handle


class _ReadRequest(Request):
    """A request whose body is a value already: FastAPI finds nothing left to read, parse or validate."""

    def __init__(self, request: Request, value: Any, slot: Slot) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value
        self._slot = slot

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> Any:
        return self._value

    def forget(self) -> None:
        self._value = None
        self._slot.free()


def forget_body(request: Request) -> None:
    """Give back the memory of a large body, for routes that go on long after they have read it."""
    if isinstance(request, _ReadRequest):
        request.forget()


def _validated(body: bytearray, field: BodyField) -> Any:
    value, errors = field.validate(parse_json(body), {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return value


def _check_type(request: Request, expected: tuple[str, ...]) -> None:
    coding = request.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise WrongContentType(f"the request body has the Content-Encoding {coding[:100]!r}: send it uncompressed.")
    essence = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = expected == JSON and _JSON_BASED.fullmatch(essence) is not None
    if essence not in expected and not is_json:
        found = f"the Content-Type {essence[:100]!r}" if essence else "no Content-Type"
        raise WrongContentType(f"the request body has {found}: send Content-Type: {expected[0]}.")
