"""What is read from disk, from Hubs and from requests: the pydantic base class, and JSON without its extensions."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from pydantic import BaseModel, ConfigDict

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Strict(BaseModel):
    """A record that refuses fields it does not declare, and that does not change once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_json(data: bytes) -> Any:
    """Parse JSON as RFC 8259 defines it, in UTF-8, so that every reader of the bytes reads the same.

    Raises ValueError for what Python's reader takes beyond that (NaN and Infinity, a key that an object has twice, half
    of a surrogate pair), for numbers beyond float64, and for objects nested too deeply to be read.
    """
    try:
        found = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _SURROGATE.search(data):
        json.dumps(found, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {next(key for key in keys if keys.count(key) > 1)[:100]!r} twice")
    return found


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value
