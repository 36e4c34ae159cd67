"""Request bodies, read within limits of size, time and memory, and parsed as JSON within limits of its shape.

Uploads are read in chunks and without the size limits: they go to disk.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

from adapterhub.errors import BodyTimeout, BodyTooLarge, UsageError
from adapterhub.units import format_duration

BODY_TIMEOUT_S = 60.0
"""Time for a whole JSON body, or for the next chunk of an upload, in seconds."""
LARGE_BODY = 64 << 10
"""Size from which a body needs a permit, in bytes."""
MAX_LARGE_BODIES = 8
"""Large bodies in memory at once, at most; the rest of other large bodies waits in the network."""
MAX_ENTRIES = 10_000
"""Members of one JSON object, or entries of one list that are not token ids, at most."""
MAX_DEPTH = 200
"""Levels of nested JSON, at most. Python's own limit of 1,000 must also do for the code that uses the value."""
_MAX_DIGITS = 100
"""Digits of an integer, at most: no field takes more, and thousands of digits take milliseconds to parse."""
_MAX_OTHER_VALUES = 20_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class ClientGone(Exception):
    """The client closed the connection before the answer was complete."""


class BodyPermit:
    """Permit to hold one large body in memory."""

    def __init__(self, permits: asyncio.Semaphore) -> None:
        self._permits = permits
        self._is_held = False

    async def acquire(self) -> None:
        """Wait for the permit; do nothing where it is held already."""
        if not self._is_held:
            await self._permits.acquire()
            self._is_held = True

    def release(self) -> None:
        """Release the permit; do nothing where it is not held."""
        if self._is_held:
            self._is_held = False
            self._permits.release()


class BodyReader:
    """Reads JSON bodies of at most `max_bytes` with at most as many values as a prompt of `max_tokens` needs."""

    def __init__(self, *, max_bytes: int, max_tokens: int) -> None:
        self._max_bytes = max_bytes
        self._max_values = _MAX_OTHER_VALUES + 2 * max_tokens
        self._permits = asyncio.Semaphore(MAX_LARGE_BODIES)

    @asynccontextmanager
    async def permit(self) -> AsyncGenerator[BodyPermit, None]:
        """Yield a permit, not yet acquired; release it at the end."""
        permit = BodyPermit(self._permits)
        try:
            yield permit
        finally:
            permit.release()

    async def read(self, request: Request, permit: BodyPermit) -> bytearray:
        """Return the body. Raises BodyTooLarge as soon as it is, BodyTimeout, ClientGone."""
        self._check_size(declared_size(request))
        body, values, ends = bytearray(), _ValueCounter(), Deadline()
        async for chunk in body_chunks(request, ends):
            self._check_size(len(body) + len(chunk))
            if len(body) + len(chunk) > LARGE_BODY:
                with ends.paused():
                    await permit.acquire()
            body += chunk
            if values.feed(chunk) > self._max_values:
                raise BodyTooLarge(
                    f"the request body has too many JSON values: expected at most {self._max_values:,}. Send a shorter "
                    "prompt."
                )
        return body

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLarge(
                f"the request body is too large: expected at most {self._max_bytes:,} bytes. Send less, or start the "
                "server with a larger --max-body-mb."
            )


def declared_size(request: Request) -> int:
    """Return the size of the body by its Content-Length, in bytes; 0 where there is none."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else 0


def has_body(request: Request) -> bool:
    """Return whether the request's headers announce a body."""
    return declared_size(request) > 0 or "transfer-encoding" in request.headers


class Deadline:
    """The moment BODY_TIMEOUT_S from now, later by the time for which it is paused."""

    def __init__(self) -> None:
        self.at = _now() + BODY_TIMEOUT_S
        """Time on the event loop's clock, in seconds."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time until the block ends."""
        begun = _now()
        yield
        self.at += _now() - begun


def _now() -> float:
    return asyncio.get_running_loop().time()


async def body_chunks(request: Request, deadline: Deadline | None = None) -> AsyncGenerator[bytes, None]:
    """Yield the body as it arrives. Without a `deadline`, each chunk has BODY_TIMEOUT_S.

    Raises BodyTimeout, ClientGone.
    """
    has_more = True
    while has_more:
        ends = deadline or Deadline()
        try:
            async with asyncio.timeout_at(ends.at):
                message = await request.receive()
        except TimeoutError:
            raise BodyTimeout(
                f"the request body did not arrive in time: expected within {format_duration(BODY_TIMEOUT_S)}. "
                "Send it faster, or less."
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        has_more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


class _ValueCounter:
    """Counts the commas and opening brackets of JSON outside its strings, chunk by chunk.

    These are about as many as its values, which is what parsing costs; text costs next to nothing.
    """

    def __init__(self) -> None:
        self._count = 0
        self._is_in_string = False
        self._held_back = b""

    def feed(self, chunk: bytes) -> int:
        """Count a chunk. Return the number so far."""
        text = self._held_back + chunk
        text = text.replace(b"\\\\", b"")
        # A backslash at the end may escape what the next chunk begins with.
        self._held_back = b"\\" if text.endswith(b"\\") else b""
        parts = text.replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._is_in_string :: 2])
        self._is_in_string ^= len(parts) % 2 == 0
        self._count += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        return self._count


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises UsageError for anything else, and RequestValidationError with the path to text that is not Unicode.
    """
    if not body.strip():
        raise UsageError("the request body is empty: expected a JSON object. Send one.")
    encoding = json.detect_encoding(bytes(body[:4]))
    if not encoding.startswith("utf-8") and len(body) > LARGE_BODY:
        raise UsageError(f"the request body is {encoding}: expected UTF-8. Encode the JSON as UTF-8.")
    try:
        text = body.decode(encoding)
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"invalid {encoding} at byte {error.start} of the request body: expected UTF-8. Encode the JSON as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"the request body is not valid JSON: {error.msg} ({where}). Send a JSON object.") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(found, dict):
        raise UsageError(f"the request body is {_kind(found)}: expected a JSON object. Send one.")
    if _SURROGATE.search(text) or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_values(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what no field takes, before validation makes an error of each entry."""
    if len(pairs) > MAX_ENTRIES:
        raise BodyTooLarge(f"an object has {len(pairs):,} members: expected at most {MAX_ENTRIES:,}. Send fewer.")
    for name, value in pairs:
        if isinstance(value, list) and len(value) > MAX_ENTRIES:
            are_tokens = name == "prompt" and set(map(type, value)) == {int}
            if not are_tokens:
                raise BodyTooLarge(
                    f"{name[:100]} has {len(value):,} entries: expected at most {MAX_ENTRIES:,} in a list that is not "
                    "token ids. Send fewer."
                )
    return dict(pairs)


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise UsageError(f"an integer has {len(digits):,} digits: expected at most {_MAX_DIGITS}. Send a shorter one.")
    return int(digits)


def _check_values(found: dict[str, Any]) -> None:
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), found)]
    while pending:
        path, value = pending.pop()
        if len(path) > MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, list):
            pending.extend(((*path, index), one) for index, one in enumerate(value))
        elif isinstance(value, dict):
            for name, one in value.items():
                _check_text(name, path)
                pending.append(((*path, name), one))


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"half a surrogate pair (\\u{ord(text[error.start]):04x}) is not Unicode text: send whole characters"
        raise RequestValidationError([{"type": "surrogate", "loc": ("body", *path), "msg": message}]) from None


def _too_deep() -> UsageError:
    return UsageError(
        f"the request body is nested too deeply: expected at most {MAX_DEPTH} levels. Send a flatter object."
    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a string", bool: "true or false"}.get(type(value), "a number")
