"""Guided decoding: answers that must fit a JSON schema, a regular expression or a grammar. The only door to llguidance.

llguidance and not xgrammar or outlines-core: it computes each step's mask lazily, so a schema costs nothing before the
first token, speaks JSON schema, regular expressions and Lark grammars alike, and its wheel needs nothing else.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
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

_NUM_MASK_THREADS = 4
"""masks computed at the same time; one takes 0.1 ms, or half a second at the limits"""
_NUM_READERS = 2
"""Grammars read at the same time: a small one need not wait for a large one, nor the model for many."""
_NUM_GRAMMARS = 8
"""kept as they were read, for the choices of one question and for those who ask the same"""
_STACK_BYTES = 64 << 20
"""Of all threads: llguidance follows references by recursion, 7 kB each. Address space only, until it is used."""


class Matcher:
    """How far one answer has come within its constraint. Its masks are computed beside the model's steps."""

    def __init__(self, kind: str, matcher: LLMatcher, first: torch.Tensor, threads: ThreadPoolExecutor) -> None:
        """`first`: the mask of the first token."""
        self._kind = kind
        self._matcher = matcher
        self._threads = threads
        self._mask: Future[torch.Tensor] = Future()
        self._mask.set_result(first)

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

    def _compute(self, token: int) -> torch.Tensor:
        """[tokens] which may come after `token`."""
        if not self._matcher.is_stopped():  # complete: only the end may follow, once or again
            self._matcher.consume_token(token)
        return _mask_of(self._kind, self._matcher)


class Constraints:
    """Makes matchers for one tokenizer.

    Grammars are read on threads of their own: no mask of an answer that runs waits for one that begins.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._mask_threads = _threads_with_deep_stacks(_NUM_MASK_THREADS, "masks")
        self._readers = _threads_with_deep_stacks(_NUM_READERS, "grammars")
        self._beginning: set[Future[Matcher]] = set()
        self._read = lru_cache(_NUM_GRAMMARS)(self._read_grammar)

    def prepare(self) -> None:
        """Read the vocabulary now: it holds Python's lock for half a second, which the first answer would else pay.

        Raises ConstraintFailed for a tokenizer that llguidance cannot read.
        """
        self._matching_tokenizer()

    def begin(self, constraint: Constraint) -> Future[Matcher]:
        """Make the matcher of a new answer, after those begun before; takes a second for the largest grammars.

        Raises ConstraintFailed, with llguidance's reason, for a constraint that cannot be followed.
        """
        begun = self._readers.submit(self._begin, constraint)
        self._beginning.add(begun)
        begun.add_done_callback(self._beginning.discard)
        return begun

    @property
    def num_beginning(self) -> int:
        """Answers whose constraint is being read, or waits to be."""
        return len(self._beginning)

    def close(self) -> None:
        self._readers.shutdown(wait=False)
        self._mask_threads.shutdown(wait=False)

    def _begin(self, constraint: Constraint) -> Matcher:
        matcher, first = self._read(constraint)
        return Matcher(constraint.kind, matcher.deep_copy(), first, self._mask_threads)

    def _read_grammar(self, constraint: Constraint) -> tuple[LLMatcher, torch.Tensor]:
        """Also what the first token may be: fails for what no text fits, and for what is beyond limits."""
        matcher = LLMatcher(self._matching_tokenizer(), _grammar(constraint), log_level=0, limits=_LIMITS)
        _check(constraint.kind, matcher)
        return matcher, _mask_of(constraint.kind, matcher)

    def _matching_tokenizer(self) -> LLTokenizer:
        if isinstance(self._vocabulary, str):
            raise ConstraintFailed(f"guided decoding cannot read this base's tokenizer: {self._vocabulary}.")
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> LLTokenizer | str:
        """For llguidance, or why it cannot be read; that, too, is found once."""
        try:
            return from_tokenizer(self._tokenizer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            return " ".join(str(error).split())[:500].rstrip(".:")


def _threads_with_deep_stacks(count: int, name: str) -> ThreadPoolExecutor:
    """The stack's size is a setting of the process, for threads started from then on: start all of them under it."""
    threads = ThreadPoolExecutor(count, thread_name_prefix=name)
    all_started = threading.Barrier(count)
    before = threading.stack_size(_STACK_BYTES)
    try:
        for one in [threads.submit(all_started.wait) for _ in range(count)]:
            one.result()
    finally:
        threading.stack_size(before)
    return threads


_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""as json.dumps writes: small models left free to choose may write spaces without end"""


def _mask_of(kind: str, matcher: LLMatcher) -> torch.Tensor:
    """[tokens] which may come next."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    _check(kind, matcher)
    return torch.from_numpy(bits.astype(bool))


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
