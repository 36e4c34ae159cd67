"""Sizes of single fields beyond which a request costs its neighbours more than it can be worth. Knows no engine."""

from __future__ import annotations

from adapterhub.errors import UsageError
from serve.engine import SamplingParams

MAX_STOP_LENGTH = 1000
"""characters of a stop string, which is looked for in every piece of an answer"""
MAX_CONSTRAINT_LENGTH = 64 << 10
"""characters of a schema, regex or grammar: one that refers on and on takes a fifth of the stack it is read on
(serve/constrained.py)"""


def check_sampling(sampling: SamplingParams) -> None:
    """Raises UsageError."""
    longest = max(map(len, sampling.stop), default=0)
    if longest > MAX_STOP_LENGTH:
        raise UsageError(f"a stop string has {longest:,} characters: send at most {MAX_STOP_LENGTH:,}.")
    constraint = sampling.constraint
    if constraint is not None and len(constraint.text) > MAX_CONSTRAINT_LENGTH:
        raise UsageError(
            f"the {constraint.kind} has {len(constraint.text):,} characters: send at most {MAX_CONSTRAINT_LENGTH:,}."
        )
