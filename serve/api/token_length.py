"""How many tokens a text gives at least: tells that it is too long without tokenizing it. Knows no requests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

_SHRINKING = {"Prepend": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
"""normalizer -> how many characters it may make one of: no character decomposes canonically into more than four"""
_CUTTING = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")
"""pre-tokenizers that cut a text and drop nothing of it, unless they are told to remove"""


@dataclass(frozen=True)
class TokenBound:
    """A bound that holds for every text: no token stands for more than `max_length` characters of it."""

    max_length: int
    dropped: str = ""
    """characters that the vocabulary lacks, and that vanish"""

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBound | None:
        """The bound of a tokenizer; None where it sets none.

        There is one where characters end up in some token: byte-level BPE, and BPE that falls back to bytes, without
        normalizers, pre-tokenizers or added tokens that swallow text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer) or not isinstance(backend.model, BPE):
            return None
        cuts = _steps(backend.pre_tokenizer, "pretokenizers")
        shrinking = [_shrinks_by(step) for step in _steps(backend.normalizer, "normalizers")]
        swallows = (
            any(step["type"] not in _CUTTING or step.get("behavior") == "Removed" for step in cuts)
            or any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
            or None in shrinking
        )
        dropped = _dropped(backend, is_byte_level=any(step["type"] == "ByteLevel" for step in cuts))
        if swallows or dropped is None:
            return None
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)))
        for factor in shrinking:
            longest *= factor or 1
        return cls(longest, dropped)

    def least(self, text: str) -> int:
        """Tokens that `text` gives at least."""
        kept = len(text) - sum(map(text.count, self.dropped))
        return -(-kept // self.max_length)


def _dropped(backend: Tokenizer, *, is_byte_level: bool) -> str | None:
    """Characters that give no token at all; None where they cannot be told."""
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
    """How byte-level BPE writes each byte (Radford et al. 2019, bytes_to_unicode)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


def _shrinks_by(step: dict[str, Any]) -> int | None:
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return 1 if replaced is not None and len(replaced) <= len(step["content"]) else None
    return _SHRINKING.get(step["type"])


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json describes them."""
    return [] if component is None else _flat(json.loads(component.__getstate__()), name)


def _flat(described: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if described["type"] != "Sequence":
        return [described]
    return [step for part in described[name] for step in _flat(part, name)]
