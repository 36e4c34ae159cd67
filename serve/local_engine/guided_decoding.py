"""Guided decoding: answers that match a JSON schema, a regular expression or a grammar, by llguidance.

No other module imports llguidance. It is used rather than xgrammar or outlines-core because it computes each step's
mask lazily, so that a schema costs nothing before the first token; it supports JSON schema, regular expressions and
Lark grammars alike; and its wheel has no dependencies.
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
from serve.engine import GuidedDecoding

_LIMITS = LLParserLimits(step_max_items=5_000)
"""Limits of a parser step, a tenth of llguidance's own.

Schemas of 300 alternatives stay under 2,000 items, and taking a token holds Python's lock (measured: 15 ms at this
limit, 340 ms at llguidance's).
"""

_NUM_MASK_THREADS = 4
"""Masks computed at the same time; one takes 0.1 ms, or half a second at the limits."""
_NUM_COMPILERS = 2
"""Grammars compiled at the same time: a small one need not wait for a large one, nor the model for many."""
_NUM_GRAMMARS = 8
"""Compiled grammars kept for the choices of one request and for requests with the same grammar."""
_STACK_BYTES = 64 << 20
"""Stack size of each thread: llguidance follows references by recursion, 7 kB each. Unused stack takes no memory."""


class Matcher:
    """State of one answer within its grammar. Token masks are computed while the model runs."""

    def __init__(self, kind: str, matcher: LLMatcher, first: torch.Tensor, threads: ThreadPoolExecutor) -> None:
        """Begin an answer; `first` is the mask of its first token."""
        self._kind = kind
        self._matcher = matcher
        self._threads = threads
        self._mask: Future[torch.Tensor] = Future()
        self._mask.set_result(first)

    @property
    def is_ready(self) -> bool:
        """Whether the next mask is computed."""
        return self._mask.done()

    def when_ready(self, act: Callable[[], None]) -> None:
        """Call `act`, on any thread, once the next mask is computed."""
        self._mask.add_done_callback(lambda _: act())

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return [vocabulary] with -inf for every token that the grammar does not allow. Raises ConstraintFailed."""
        mask = self._mask.result()
        forbidden = torch.ones(logits.numel(), dtype=torch.bool)
        width = min(len(mask), logits.numel())
        forbidden[:width] = ~mask[:width]
        return logits.masked_fill(forbidden.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Append `token` to the answer, and begin to compute the next mask."""
        self._mask = self._threads.submit(self._compute, token)

    def _compute(self, token: int) -> torch.Tensor:
        """Return [tokens], True for those that may come after `token`."""
        if not self._matcher.is_stopped():  # complete: only end tokens may follow
            self._matcher.consume_token(token)
        return _mask_of(self._kind, self._matcher)


class GuidedDecoder:
    """Makes the matchers of answers for one tokenizer.

    Grammars are compiled on separate threads: no mask of a running answer waits for an answer that begins.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._mask_threads = _threads_with_deep_stacks(_NUM_MASK_THREADS, "masks")
        self._compilers = _threads_with_deep_stacks(_NUM_COMPILERS, "grammars")
        self._preparing: set[Future[Matcher]] = set()
        self._compiled = lru_cache(_NUM_GRAMMARS)(self._compile_grammar)

    def prepare(self) -> None:
        """Read the vocabulary now. It holds Python's lock for half a second, which would delay running answers.

        Raises ConstraintFailed for a tokenizer that llguidance cannot read.
        """
        self._matching_tokenizer()

    def begin(self, guided: GuidedDecoding) -> Future[Matcher]:
        """Make the matcher of a new answer; this takes a second for the largest grammars.

        The future raises ConstraintFailed, with llguidance's reason, for a grammar that no answer can follow.
        """
        begun = self._compilers.submit(self._begin, guided)
        self._preparing.add(begun)
        begun.add_done_callback(self._preparing.discard)
        return begun

    @property
    def num_preparing(self) -> int:
        """Number of answers whose grammar is compiled, or waits for that."""
        return len(self._preparing)

    def close(self) -> None:
        self._compilers.shutdown(wait=False)
        self._mask_threads.shutdown(wait=False)

    def _begin(self, guided: GuidedDecoding) -> Matcher:
        matcher, first = self._compiled(guided)
        return Matcher(guided.kind, matcher.deep_copy(), first, self._mask_threads)

    def _compile_grammar(self, guided: GuidedDecoding) -> tuple[LLMatcher, torch.Tensor]:
        """Compile a grammar and its first mask. Raises ConstraintFailed where no text matches, or beyond the limits."""
        matcher = LLMatcher(self._matching_tokenizer(), _grammar(guided), log_level=0, limits=_LIMITS)
        _check(guided.kind, matcher)
        return matcher, _mask_of(guided.kind, matcher)

    def _matching_tokenizer(self) -> LLTokenizer:
        if isinstance(self._vocabulary, str):
            raise ConstraintFailed(f"guided decoding cannot read this base's tokenizer: {self._vocabulary}.")
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> LLTokenizer | str:
        """The tokenizer as llguidance reads it, or the reason why it cannot."""
        try:
            return from_tokenizer(self._tokenizer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            return " ".join(str(error).split())[:500].rstrip(".:")


def _threads_with_deep_stacks(count: int, name: str) -> ThreadPoolExecutor:
    """Start all threads of a pool at once: the stack size is a process-wide setting for threads started under it."""
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
"""JSON whitespace as json.dumps writes it: small models that may choose write spaces without end."""


def _mask_of(kind: str, matcher: LLMatcher) -> torch.Tensor:
    """Return [tokens], True for those that may come next."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    _check(kind, matcher)
    return torch.from_numpy(bits.astype(bool))


def _check(kind: str, matcher: LLMatcher) -> None:
    """Raise ConstraintFailed for a matcher that failed; llguidance itself raises nothing, but ends the text."""
    if matcher.is_error():
        # In one line, without the parser's state.
        found = " ".join(matcher.get_error().partition("<state>")[0].split()).rstrip(".:")
        reason = "no text satisfies it" if found.startswith("NoExtensionBias") else found[:500]
        raise ConstraintFailed(f"no answer can follow the {kind}: {reason}.")


def _grammar(guided: GuidedDecoding) -> str:
    try:
        if guided.kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(json.loads(guided.text), overrides=_JSON))
        if guided.kind == "regex":
            return str(LLMatcher.grammar_from_regex(guided.text))
        return str(LLMatcher.grammar_from_lark(guided.text))
    except (ValueError, RecursionError) as error:
        raise ConstraintFailed(f"the {guided.kind} cannot be read: {error}.") from error
