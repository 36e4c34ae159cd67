"""The bytes that each token of a tokenizer stands for; a character may be split over several tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
"""A byte, as byte-fallback tokenizers (Llama 2, Mistral, Gemma) write it."""


class TokenBytes:
    """Table of each token's bytes, and of its name in log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        """Read `tokenizer`, of the tokenizers library, with a byte-level or byte-fallback decoder.

        With another decoder (WordPiece, ...) a token's bytes are those of its text when decoded alone.
        """
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._known: dict[int, bytes] = {}
        steps = _steps(tokenizer.decoder)
        found = _byte_level(steps) or _byte_fallback(steps)
        self.is_exact = found is not None
        """Whether the bytes of an answer's tokens, joined, are its text."""
        self._bytes_of_word = found[0] if found else None
        self._leading_spaces = found[1] if found else 0

    def __call__(self, token: int) -> bytes:
        """Return the bytes `token` adds to a text; none for a special token, or one that is not in the vocabulary."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def first(self, token: int) -> bytes:
        """Return the bytes of `token` at the beginning of a text, where some tokenizers drop a space."""
        found, spaces = self(token), self._leading_spaces
        return found[min(spaces, len(found) - len(found.lstrip(b" "))) :]

    def is_special(self, token: int) -> bool:
        return token in self._special

    def special_within(self, texts: Sequence[str]) -> dict[int, str]:
        """Return the special tokens that occur in `texts`, as {id: text}."""
        names = {token: self._tokenizer.id_to_token(token) for token in self._special} if texts else {}
        return {token: name for token, name in names.items() if name and any(name in text for text in texts)}

    def begins_text(self, prompt: Sequence[int]) -> bool:
        """Return whether what follows `prompt` is the first text there is."""
        return all(token in self._special for token in prompt)

    def name(self, token: int, data: bytes) -> tuple[str, bytes | None]:
        """Return (name, bytes) of a token for a list of log-probabilities, as OpenAI writes them."""
        if token in self._special:
            return self._tokenizer.id_to_token(token) or "", None
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def _look_up(self, token: int) -> bytes:
        word = None if token in self._special else self._tokenizer.id_to_token(token)
        if word is None:
            return b""
        if self._bytes_of_word is None:
            return str(self._tokenizer.decode([token])).encode()
        return self._bytes_of_word(word)


@lru_cache(maxsize=4)
def token_bytes_of(tokenizer: Any) -> TokenBytes:
    """Return the one TokenBytes of a tokenizer."""
    return TokenBytes(tokenizer)


_Found = tuple[Callable[[str], bytes], int]
"""(Bytes of a word of the vocabulary, spaces to drop at the beginning of a text)."""


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    described = json.loads(decoder.__getstate__())
    return described["decoders"] if described["type"] == "Sequence" else [described]


def _byte_level(steps: list[dict[str, Any]]) -> _Found | None:
    if [step["type"] for step in steps if step["type"] != "Fuse"] != ["ByteLevel"]:
        return None
    byte_of = _byte_of_char()

    def bytes_of(word: str) -> bytes:
        try:
            return bytes(byte_of[char] for char in word)
        except KeyError:  # an added token, written as it is
            return word.encode()

    return bytes_of, 0


def _byte_fallback(steps: list[dict[str, Any]]) -> _Found | None:
    replaced: list[tuple[str, str]] = []
    spaces = 0
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
            spaces = 0 if step["prepend_scheme"] == "never" else 1
        elif step["type"] == "Strip" and step["content"] == " " and not step["stop"]:
            spaces = step["start"]
        elif step["type"] not in ("ByteFallback", "Fuse"):
            return None
    if not replaced:
        return None
    has_bytes = any(step["type"] == "ByteFallback" for step in steps)

    def bytes_of(word: str) -> bytes:
        if has_bytes and (byte := _BYTE.fullmatch(word)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            word = word.replace(old, new)
        return word.encode()

    return bytes_of, spaces


def _byte_of_char() -> dict[str, int]:
    """Return the printable character -> byte table of GPT-2's byte-level vocabularies."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
