"""Regular expressions over module names, as PEFT's configs have them, matched in linear time.

An adapter's author wrote them: Python's own engine may take forever on one. RE2 takes linear time and limited memory.
PEFT uses Python's engine, so a pattern that the two would read in different ways is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

MAX_PATTERN = 10_000
"""Maximum length of a pattern, in characters."""
MAX_PATTERNS = 4096
"""Maximum number of patterns of ranks, and of alphas. EVA writes one for each module."""
_READ_OTHERWISE = re.compile(r"\[:|\{,")
"""`[[:alpha:]]` and `{,2}`: to one engine a class and a repetition, to the other these characters."""


def check_pattern(text: str) -> str:
    """Return a pattern for whole names.

    Raises ValueError for one that is too long, that RE2 does not know (look-around), or that Python reads otherwise.
    """
    return _checked(text, text)


def check_ending(text: str) -> str:
    """Return a pattern for the ends of names, as PEFT reads it. Raises ValueError, as `check_pattern` does."""
    return _checked(text, rf"(.*\.)?({text})$")


def _checked(text: str, pattern_of_peft: str) -> str:
    compiled(text)
    # RE2's \w and \d are those of ASCII.
    if not text.isascii() or _READ_OTHERWISE.search(text):
        raise ValueError(f"the pattern {text[:60]!r} has another meaning in Python's regular expressions than in RE2's")
    try:
        re.compile(pattern_of_peft)  # takes linear time; matching may not
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern {text[:60]!r} is not a regular expression of Python ({error})") from error
    return text


@lru_cache(maxsize=4 * MAX_PATTERNS)  # each by itself, and as an ending
def compiled(text: str) -> Any:
    """Return the compiled pattern. Raises ValueError."""
    import re2  # lists of adapters need no pattern

    if len(text) > MAX_PATTERN:
        raise ValueError(f"the pattern {text[:60]!r}... has {len(text):,} characters: expected at most {MAX_PATTERN:,}")
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"the pattern {text[:60]!r} is not a regular expression of RE2 ({reason[:100]})") from error


def matches(text: str, module: str) -> bool:
    """Return whether the pattern matches the whole name of a module: PEFT's rule for a target that is a string."""
    return compiled(text).fullmatch(module) is not None


def ends_with(text: str, module: str) -> bool:
    """Return whether the pattern matches an end of the dotted name: PEFT's rule for rank and alpha patterns."""
    return compiled(rf"(?:.*\.)?(?:{text})").fullmatch(module) is not None
