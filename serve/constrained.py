"""Guided decoding: answers that must fit a JSON schema, a regular expression or a grammar. The only door to llguidance.

llguidance and not xgrammar or outlines-core: it computes each step's mask lazily, so a schema costs nothing before the
first token, speaks JSON schema, regular expressions and Lark grammars alike, and its wheel needs nothing else.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from adapterhub.errors import ConstraintFailed
from serve.engine import Constraint

_LIMITS = LLParserLimits(step_max_items=5_000)
"""A tenth of llguidance's own: honest schemas of 300 alternatives stay under 2,000, and taking a token holds Python's
lock (measured: 15 ms at this limit, 340 ms at llguidance's)."""

_NUM_THREADS = 4
"""masks computed at the same time; one takes 0.1 ms, or half a second at the limits"""
_STACK_BYTES = 64 << 20
"""Of their threads: llguidance follows references by recursion, 7 kB each. Address space only, until it is used."""


class Matcher:
    """How far one answer has come within its constraint. Its masks are computed beside the model's steps."""

    def __init__(self, kind: str, matcher: LLMatcher, threads: ThreadPoolExecutor) -> None:
        """Computes the first mask. Raises ConstraintFailed for what no text fits, and for what is beyond limits."""
        self._kind = kind
        self._matcher = matcher
        self._threads = threads
        self._mask: Future[torch.Tensor] = Future()
        self._mask.set_result(self._compute())

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is there."""
        return self._mask.done()

    def when_ready(self, act: Callable[[], None]) -> None:
        """Call `act`, on any thread, once the next mask is there."""
        self._mask.add_done_callback(lambda _: act())

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return [vocabulary] with -inf for every token that would leave the constraint. Raises ConstraintFailed."""
        mask = self._mask.result()
        forbidden = torch.ones(logits.numel(), dtype=torch.bool)
        width = min(len(mask), logits.numel())
        forbidden[:width] = ~mask[:width]
        return logits.masked_fill(forbidden.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Go on by `token`, and begin to compute the next mask."""
        self._mask = self._threads.submit(self._compute, token)

    def _compute(self, token: int | None = None) -> torch.Tensor:
        """[tokens] which may come after `token`."""
        if token is not None and not self._matcher.is_stopped():  # complete: only the end may follow, once or again
            self._matcher.consume_token(token)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        _check(self._kind, self._matcher)
        return torch.from_numpy(bits.astype(bool))


class Constraints:
    """Makes matchers for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._threads = _threads_with_deep_stacks()

    def prepare(self) -> None:
        """Read the vocabulary now: it holds Python's lock for half a second, which the first answer would else pay."""
        _ = self._matching_tokenizer

    def begin(self, constraint: Constraint) -> Future[Matcher]:
        """Make the matcher of a new answer; takes a second for the largest grammars.

        Raises ConstraintFailed, with llguidance's reason, for a constraint that cannot be followed.
        """
        return self._threads.submit(self._begin, constraint)

    def _begin(self, constraint: Constraint) -> Matcher:
        matcher = LLMatcher(self._matching_tokenizer, _grammar(constraint), log_level=0, limits=_LIMITS)
        _check(constraint.kind, matcher)
        return Matcher(constraint.kind, matcher, self._threads)

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    @cached_property
    def _matching_tokenizer(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer)


def _threads_with_deep_stacks() -> ThreadPoolExecutor:
    """The stack's size is a setting of the process, for threads started from then on: start all of them under it."""
    threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="masks")
    all_started = threading.Barrier(_NUM_THREADS)
    before = threading.stack_size(_STACK_BYTES)
    try:
        for one in [threads.submit(all_started.wait) for _ in range(_NUM_THREADS)]:
            one.result()
    finally:
        threading.stack_size(before)
    return threads


_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""as json.dumps writes: small models left free to choose may write spaces without end"""


def _check(kind: str, matcher: LLMatcher) -> None:
    """llguidance raises nothing: a matcher that failed says so, and allows the end of the text only."""
    if matcher.is_error():
        # Without the parser's state, in one line.
        found = " ".join(matcher.get_error().partition("<state>")[0].split()).rstrip(".:")
        reason = "no text fits it" if found.startswith("NoExtensionBias") else found[:500]
        raise ConstraintFailed(f"the {kind} cannot be followed: {reason}.")


def _grammar(constraint: Constraint) -> str:
    try:
        if constraint.kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(json.loads(constraint.text), overrides=_JSON))
        if constraint.kind == "regex":
            return str(LLMatcher.grammar_from_regex(constraint.text))
        return str(LLMatcher.grammar_from_lark(constraint.text))
    except (ValueError, RecursionError) as error:
        raise ConstraintFailed(f"the {constraint.kind} cannot be read: {error}.") from error
