"""Limits of single request fields that would slow down other requests."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.errors import UsageError

MAX_STOP_LENGTH = 1000
"""Length of a stop string, in characters: every delta of an answer is searched for it."""
MAX_GRAMMAR_LENGTH = 64 << 10
"""Length of a schema, regex, grammar or list of choices, in characters.

At this length, a chain of references takes a fifth of the stack of its reader (serve/local_engine/guided_decoding.py).
"""


def check_stop(stop: Sequence[str]) -> None:
    """Check the length of each stop string. Raises UsageError."""
    longest = max(map(len, stop), default=0)
    if longest > MAX_STOP_LENGTH:
        raise UsageError(
            f"a stop string has {longest:,} characters: expected at most {MAX_STOP_LENGTH:,}. Send a shorter one."
        )


def check_length(length: int) -> None:
    """Check the length of a schema, regex, grammar or choices. Raises ValueError, which pydantic reports by field."""
    if length > MAX_GRAMMAR_LENGTH:
        raise ValueError(f"{length:,} characters are too many: expected at most {MAX_GRAMMAR_LENGTH:,}")
