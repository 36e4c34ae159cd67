"""Sizes of single fields beyond which a request costs its neighbours more than it can be worth. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.errors import UsageError

MAX_STOP_LENGTH = 1000
"""characters of a stop string, which is looked for in every piece of an answer"""
MAX_CONSTRAINT_LENGTH = 64 << 10
"""characters of a schema, regex, grammar or list of choices: one that refers on and on takes a fifth of the stack that
it is read on (serve/local_engine/guided_decoding.py)"""


def check_stop(stop: Sequence[str]) -> None:
    """Raises UsageError."""
    longest = max(map(len, stop), default=0)
    if longest > MAX_STOP_LENGTH:
        raise UsageError(f"a stop string has {longest:,} characters: send at most {MAX_STOP_LENGTH:,}.")


def check_length(length: int) -> None:
    """Of what an answer must fit. Raises ValueError, for the field that it is in."""
    if length > MAX_CONSTRAINT_LENGTH:
        raise ValueError(f"{length:,} characters are too long: send at most {MAX_CONSTRAINT_LENGTH:,}")
