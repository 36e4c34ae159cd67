"""Puts what pydantic found wrong with a request into a sentence. Knows no routes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_MAX_FAULTS = 5
_MAX_NAME = 100
_BRANCH = re.compile(r"(str|int|float|bool|list|dict|AdapterChoice)(\[.*\])?")
"""how pydantic calls the alternatives of a union, in the path to a fault"""


def described(faults: Sequence[Any]) -> tuple[str, str | None]:
    """A sentence about the faults, and the field that the first is in."""
    said: dict[str, str] = {}
    for fault in faults[: 10 * _MAX_FAULTS]:
        said.setdefault(_name(fault["loc"][1:]), fault["msg"].removeprefix("Value error, "))
    # Of a union's alternatives, the one the client meant is the one that went deeper.
    names = [name for name in said if not any(other.startswith(f"{name}.") for other in said if name)]
    told = "; ".join(f"{name or 'body'}: {said[name]}" for name in names[:_MAX_FAULTS])
    more = len(faults) - len(said) + len(names) - _MAX_FAULTS if len(names) > _MAX_FAULTS else 0
    return told + (f"; and {more} more" if more > 0 else ""), names[0] or None


def _name(path: Sequence[str | int]) -> str:
    parts = [str(part)[:_MAX_NAME] for part in path]
    # The first part is always a field.
    return ".".join(part for index, part in enumerate(parts) if not index or not _BRANCH.fullmatch(part))
