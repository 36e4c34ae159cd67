"""Pydantic's validation errors of a request as one message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_MAX_ERRORS = 5
_MAX_NAME = 100
_BRANCH = re.compile(r"(str|int|float|bool|list|dict|AdapterChoice)(\[.*\])?")
"""Pydantic's names of the alternatives of a union, in the path to an error."""


def described(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Return a message with the errors, and the field of the first."""
    messages: dict[str, str] = {}
    for error in errors[: 10 * _MAX_ERRORS]:
        messages.setdefault(_name(error["loc"][1:]), error["msg"].removeprefix("Value error, "))
    # Of a union's alternatives, the one the client meant is the one with the deeper path.
    names = [name for name in messages if not any(other.startswith(f"{name}.") for other in messages if name)]
    listed = "; ".join(f"{name or 'body'}: {messages[name]}" for name in names[:_MAX_ERRORS])
    more = len(errors) - len(messages) + len(names) - _MAX_ERRORS if len(names) > _MAX_ERRORS else 0
    return listed + (f"; and {more} more" if more > 0 else ""), names[0] or None


def _name(path: Sequence[str | int]) -> str:
    parts = [str(part)[:_MAX_NAME] for part in path]
    # The first part is always a field.
    return ".".join(part for index, part in enumerate(parts) if not index or not _BRANCH.fullmatch(part))
