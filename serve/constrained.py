"""Answers that must fit a JSON schema, a regular expression or a grammar. The only door to llguidance.

llguidance and not xgrammar or outlines-core: it computes each step's mask lazily, so a schema costs nothing before the
first token, speaks JSON schema, regular expressions and Lark grammars alike, and its wheel needs nothing else.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from adapterhub.errors import UsageError
from serve.engine import Constraint


class Matcher:
    """How far one answer has come within its constraint."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """[vocabulary] with -inf for every token that would leave the constraint."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.zeros(logits.numel(), dtype=torch.bool)
        width = min(len(bits), logits.numel())
        allowed[:width] = torch.from_numpy(bits[:width].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


class Constraints:
    """Makes matchers for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def check(self, constraint: Constraint) -> None:
        """Raises UsageError, with llguidance's reason, for a constraint that cannot be followed."""
        fault = LLMatcher.validate_grammar(_grammar(constraint), self._matching_tokenizer)
        if fault:
            raise UsageError(f"the {constraint.kind} cannot be followed: {fault.strip().splitlines()[0]}.")

    def matcher(self, constraint: Constraint) -> Matcher:
        return Matcher(self._matching_tokenizer, _grammar(constraint))

    @cached_property
    def _matching_tokenizer(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer)


_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""as json.dumps writes: small models left free to choose may write spaces without end"""


def _grammar(constraint: Constraint) -> str:
    try:
        if constraint.kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(json.loads(constraint.text), overrides=_JSON))
        if constraint.kind == "regex":
            return str(LLMatcher.grammar_from_regex(constraint.text))
        return str(LLMatcher.grammar_from_lark(constraint.text))
    except ValueError as error:
        raise UsageError(f"the {constraint.kind} cannot be read: {error}.") from error
