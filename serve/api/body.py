"""Request bodies: read within limits of size, time and memory, and as JSON that no program chokes on.

What the JSON means is the routes'. Bodies for the disk (uploads) are read here in pieces, without the limits of size.
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

BODY_TIMEOUT_S = 60.0
"""for a whole JSON body, or for the next piece of an upload"""
LARGE_BODY = 64 << 10
"""bytes"""
MAX_LARGE_BODIES = 8
"""bodies of which more than LARGE_BODY has come that are held at a time; the rest of others waits in the network"""
MAX_ENTRIES = 10_000
"""members of one JSON object, or entries of one list that are not token ids"""
MAX_DEPTH = 200
"""levels of JSON within JSON; Python's own limit of 1,000 is shared with whatever works on the value later"""
_MAX_DIGITS = 100
"""of an integer: no field takes a longer one, and thousands of digits take milliseconds each to read"""
_MAX_OTHER_VALUES = 20_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class ClientGone(Exception):
    """The client closed the connection before the answer was complete."""


class Slot:
    """Room for one large body in memory."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._is_held = False

    async def take(self) -> None:
        """Wait for it; harmless when repeated."""
        if not self._is_held:
            await self._slots.acquire()
            self._is_held = True

    def free(self) -> None:
        """Harmless when repeated, and when nothing was taken."""
        if self._is_held:
            self._is_held = False
            self._slots.release()


class BodyReader:
    """Reads JSON bodies of at most `max_bytes` with at most as many values as a prompt of `max_tokens` needs."""

    def __init__(self, *, max_bytes: int, max_tokens: int) -> None:
        self._max_bytes = max_bytes
        self._max_values = _MAX_OTHER_VALUES + 2 * max_tokens
        self._slots = asyncio.Semaphore(MAX_LARGE_BODIES)

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[Slot, None]:
        slot = Slot(self._slots)
        try:
            yield slot
        finally:
            slot.free()

    async def read(self, request: Request, slot: Slot) -> bytearray:
        """The body. Raises BodyTooLarge as soon as it is, BodyTimeout, ClientGone."""
        self._check_size(declared_size(request))
        body, values, ends = bytearray(), _ValueCounter(), Deadline()
        async for piece in body_pieces(request, ends):
            self._check_size(len(body) + len(piece))
            if len(body) + len(piece) > LARGE_BODY:
                with ends.paused():
                    await slot.take()
            body += piece
            if values.feed(piece) > self._max_values:
                raise BodyTooLarge(
                    f"the request body holds more than {self._max_values:,} JSON values: send a shorter prompt."
                )
        return body

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLarge(
                f"the request body has more than the {self._max_bytes:,} bytes that this server takes: send less, or "
                "start the server with a larger --max-body-mb."
            )


def declared_size(request: Request) -> int:
    """Bytes the request says that its body has; 0 where it does not say."""
    said = request.headers.get("content-length", "")
    return int(said) if said.isascii() and said.isdigit() else 0


def has_body(request: Request) -> bool:
    return declared_size(request) > 0 or "transfer-encoding" in request.headers


class Deadline:
    """BODY_TIMEOUT_S from now on, not counting what passes while it is paused."""

    def __init__(self) -> None:
        self.at = _now() + BODY_TIMEOUT_S
        """loop time, s"""

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = _now()
        yield
        self.at += _now() - begun


def _now() -> float:
    return asyncio.get_running_loop().time()


async def body_pieces(request: Request, deadline: Deadline | None = None) -> AsyncGenerator[bytes, None]:
    """The body as it comes; without a `deadline`, each piece has BODY_TIMEOUT_S. Raises BodyTimeout, ClientGone."""
    has_more = True
    while has_more:
        ends = deadline or Deadline()
        try:
            async with asyncio.timeout_at(ends.at):
                message = await request.receive()
        except TimeoutError:
            raise BodyTimeout(
                f"the request body did not come within {BODY_TIMEOUT_S:.0f} s: send it faster, or less."
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        has_more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


class _ValueCounter:
    """Counts the commas and opening brackets of JSON outside of its strings, piece by piece.

    JSON has hardly more values than those; what one value costs to parse is bounded, what one byte of text costs is
    next to nothing.
    """

    def __init__(self) -> None:
        self._count = 0
        self._is_in_string = False
        self._held_back = b""

    def feed(self, piece: bytes) -> int:
        """The number so far."""
        text = self._held_back + piece
        text = text.replace(b"\\\\", b"")
        # A backslash at the end may escape what the next piece begins with.
        self._held_back = b"\\" if text.endswith(b"\\") else b""
        parts = text.replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._is_in_string :: 2])
        self._is_in_string ^= len(parts) % 2 == 0
        self._count += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        return self._count


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises UsageError for anything else, and RequestValidationError with the place of text that is no Unicode.
    """
    if not body.strip():
        raise UsageError("the request body is empty: send a JSON object.")
    encoding = json.detect_encoding(bytes(body[:4]))
    if not encoding.startswith("utf-8") and len(body) > LARGE_BODY:
        raise UsageError(f"the request body is {encoding}: send JSON as UTF-8.")
    try:
        text = body.decode(encoding)
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise UsageError(f"the request body is not {encoding} from byte {error.start} on: send UTF-8.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"the request body is not valid JSON: {error.msg} ({where}).") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(found, dict):
        raise UsageError(f"the request body is {_kind(found)}: send a JSON object.")
    if _SURROGATE.search(text) or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_values(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses what no field takes, before validation makes an error of each entry."""
    if len(pairs) > MAX_ENTRIES:
        raise BodyTooLarge(f"the request body has an object of more than {MAX_ENTRIES:,} members: send fewer.")
    for name, value in pairs:
        if isinstance(value, list) and len(value) > MAX_ENTRIES:
            are_tokens = name == "prompt" and set(map(type, value)) == {int}
            if not are_tokens:
                raise BodyTooLarge(
                    f"{name[:100]} has {len(value):,} entries, more than the {MAX_ENTRIES:,} that a list other than "
                    "token ids may have: send fewer."
                )
    return dict(pairs)


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise UsageError(f"the request body has a number of {len(digits):,} digits: send at most {_MAX_DIGITS}.")
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
        said = f"half a surrogate pair (\\u{ord(text[error.start]):04x}) is not Unicode text: send whole characters"
        raise RequestValidationError([{"type": "surrogate", "loc": ("body", *path), "msg": said}]) from None


def _too_deep() -> UsageError:
    return UsageError(f"the request body is nested more than {MAX_DEPTH} levels deep: send a flatter one.")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a text", bool: "true or false"}.get(type(value), "a number")
