"""Lower bound of the number of tokens of a text, to refuse one that is too long without tokenizing it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

_SHRINKING = {"Prepend": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
"""Normalizer -> characters that it may merge into one: no character decomposes canonically into more than four."""
_CUTTING = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")
"""Pre-tokenizers that split a text and drop nothing of it, unless their behavior is Removed."""


@dataclass(frozen=True)
class TokenBound:
    """A bound for every text: no token stands for more than `max_length` characters."""

    max_length: int
    dropped: str = ""
    """Characters that the vocabulary lacks and the tokenizer drops."""

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBound | None:
        """Return the bound of a tokenizer; None where it has none.

        It has one where every character becomes part of a token: byte-level BPE, and BPE with byte fallback, without
        normalizers, pre-tokenizers or added tokens that drop text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer) or not isinstance(backend.model, BPE):
            return None
        cuts = _steps(backend.pre_tokenizer, "pretokenizers")
        shrinking = [_shrinks_by(step) for step in _steps(backend.normalizer, "normalizers")]
        drops_text = (
            any(step["type"] not in _CUTTING or step.get("behavior") == "Removed" for step in cuts)
            or any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
            or None in shrinking
        )
        dropped = _dropped(backend, is_byte_level=any(step["type"] == "ByteLevel" for step in cuts))
        if drops_text or dropped is None:
            return None
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)))
        for factor in shrinking:
            longest *= factor or 1
        return cls(longest, dropped)

    def least(self, text: str) -> int:
        """Return the least number of tokens of `text`."""
        kept = len(text) - sum(map(text.count, self.dropped))
        return -(-kept // self.max_length)


def _dropped(backend: Tokenizer, *, is_byte_level: bool) -> str | None:
    """Return the characters that give no token; None where they are unknown."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not is_byte_level:
        bytes_of_their_own = {f"<0x{byte:02X}>" for byte in range(256)}
        return "" if backend.model.byte_fallback and bytes_of_their_own <= vocabulary.keys() else None
    letters = _byte_letters()
    if any(letters[byte] not in vocabulary for byte in range(0x80, 0xC0)):
        return None
    # Beyond ASCII every character has a byte from 0x80 to 0xBF, which is there.
    return "".join(chr(byte) for byte in range(0x80) if letters[byte] not in vocabulary)


def _byte_letters() -> dict[int, str]:
    """Map each byte to its character in byte-level BPE (Radford et al. 2019, bytes_to_unicode)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


def _shrinks_by(step: dict[str, Any]) -> int | None:
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return 1 if replaced is not None and len(replaced) <= len(step["content"]) else None
    return _SHRINKING.get(step["type"])


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, as tokenizer.json describes them."""
    return [] if component is None else _flat(json.loads(component.__getstate__()), name)


def _flat(described: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if described["type"] != "Sequence":
        return [described]
    return [step for part in described[name] for step in _flat(part, name)]
