"""What each route requires of a request before its body is read: a right, and the media type of the body."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

JSON = ("application/json",)
ZIP = ("application/zip", "application/octet-stream", "application/x-zip-compressed")


class Right(Enum):
    """Key that a route requires, where the server has keys."""

    OPEN = auto()
    """No key."""
    ASK = auto()
    """Any key."""
    MANAGE = auto()
    """An admin key."""


@dataclass(frozen=True)
class Access:
    """Requirements of one route."""

    right: Right
    body_types: tuple[str, ...] = JSON
    """Media types of the body. Never forms and plain text: any web page may send those to any server."""
    keeps_body: bool = False
    """Whether the body's permit is held until the route ends or releases it: the parsed value may be as large."""


_OPEN, _ASK, _MANAGE = Access(Right.OPEN), Access(Right.ASK), Access(Right.MANAGE)

_GENERATE = Access(Right.ASK, keeps_body=True)

ACCESS: dict[str, Access] = {
    "/": _OPEN,
    "/favicon.ico": _OPEN,
    "/openapi.json": _OPEN,
    "/health": _OPEN,
    "/ready": _OPEN,
    "/metrics": _OPEN,
    "/v1/models": _ASK,
    "/v1/models/{name:path}": _ASK,
    "/v1/chat/completions": _GENERATE,
    "/v1/completions": _GENERATE,
    "/v1/load_lora_adapter": _MANAGE,
    "/v1/unload_lora_adapter": _MANAGE,
    "/v1/adapters": _ASK,
    "/v1/adapters/inspect": _ASK,
    "/v1/adapters/diff": _ASK,
    "/v1/adapters/history": _ASK,
    "/v1/adapters/verify": _MANAGE,
    "/v1/adapters/pull": _MANAGE,
    "/v1/adapters/upload": Access(Right.MANAGE, ZIP),
    "/v1/adapters/promote": _MANAGE,
    "/v1/adapters/rollback": _MANAGE,
    "/v1/feedback": Access(Right.ASK, keeps_body=True),
    "/v1/feedback/{name}": _ASK,
    "/v1/feedback/counts": _ASK,
    "/v1/arena/battles": _ASK,
    "/v1/ratings": _ASK,
    "/v1/training/recipes": _MANAGE,
    "/v1/training/plan": _MANAGE,
    "/v1/training/runs": _MANAGE,
    "/v1/training/runs/{name}": _MANAGE,
    "/v1/training/runs/{name}/stop": _MANAGE,
    "/v1/training/runs/{name}/kill": _MANAGE,
    "/v1/training/runs/{name}/resume": _MANAGE,
    "/v1/training/runs/{name}/publish": _MANAGE,
    "/v1/training/runs/{name}/promote": _MANAGE,
    "/v1/training/improve": _MANAGE,
}
"""Path of each route -> its requirements. A route without an entry cannot be added (serve/api/route.py)."""
