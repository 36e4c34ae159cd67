"""Turn tokens into text incrementally: whole characters only, and stop strings across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from serve.local_engine.token_bytes import TokenBytes, token_bytes_of

_LONGEST_CHAR = 4
"""Bytes of the longest UTF-8 character, and so the most tokens that a character can be split into."""


class Detokenizer:
    """Incremental detokenizer of one answer; text that may be the start of a stop string is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt: Sequence[int]) -> None:
        """Begin an answer to `prompt`; `tokenizer` is of the tokenizers library."""
        self._bytes_of = token_bytes_of(tokenizer)
        self._decoder: _Decoder = (
            _ByteDecoder(self._bytes_of, prompt) if self._bytes_of.is_exact else _WordDecoder(tokenizer, prompt)
        )
        self._stop = tuple(stop)
        self._special = self._bytes_of.special_within(self._stop)
        """Text of the special tokens that occur in stop strings: searched for them, and not returned."""
        self._held = ""
        self._hidden: set[int] = set()
        """Places of their characters, counted from the beginning of the answer."""
        self._num_taken = 0
        self._begins = self._bytes_of.begins_text(prompt)
        self.is_stopped = False
        self.offset = 0
        """Index in the answer of the character in which the newest token begins."""
        self._num_decoded = 0
        self.num_given = 0
        """Number of characters returned so far."""

    def feed(self, token: int) -> str:
        """Return the text that is now final. Set `is_stopped` when a stop string is complete; it is not returned."""
        text = self._decoder.step(token, self.bytes_of(token))
        self.offset = self._num_decoded + self._decoder.num_before
        self._begins = self._begins and self._bytes_of.is_special(token)
        self._add(text)
        self._hide(self._special.get(token, ""))
        return self._certain()

    def finish(self) -> str:
        """Return what was held back, after the last token; an incomplete character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        self._add(self._decoder.finish())
        text = self._certain()
        return text if self.is_stopped else text + self._take(len(self._held))

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that `token` would add to the answer now."""
        return self._bytes_of.first(token) if self._begins else self._bytes_of(token)

    def name(self, token: int) -> tuple[str, bytes | None]:
        """Return (name, bytes) of `token` as the next one of the answer, for a list of log-probabilities."""
        return self._bytes_of.name(token, self.bytes_of(token))

    def _add(self, text: str) -> None:
        self._held += text
        self._num_decoded += len(text)

    def _hide(self, text: str) -> None:
        begin = self._num_taken + len(self._held)
        self._hidden.update(range(begin, begin + len(text)))
        self._held += text

    def _certain(self) -> str:
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - self._possible_stop_length())

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        if self._hidden:
            text = "".join(char for at, char in enumerate(text, self._num_taken) if at not in self._hidden)
        self._num_taken += length
        self.num_given += len(text)
        return text

    def _possible_stop_length(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


class _Decoder(Protocol):
    num_before: int
    """Characters of the last step's text that belong to earlier tokens."""

    def step(self, token: int, data: bytes) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """Decodes UTF-8 bytes. Invalid UTF-8 becomes U+FFFD, as in the Unicode standard, chapter 3.9."""

    num_before = 0

    def __init__(self, bytes_of: TokenBytes, prompt: Sequence[int]) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(b"".join(map(bytes_of, prompt[-_LONGEST_CHAR:])))
        self._is_joining = bool(self._utf8.getstate()[0])
        """Whether the prompt ended within a character that the answer may complete."""
        self._begun = b""

    def step(self, token: int, data: bytes) -> str:
        text = self._decode(data[:1])
        is_whole = bool(data) and not self._utf8.getstate()[0]
        self.num_before = len(text) - is_whole
        return text + self._decode(data[1:])

    def _decode(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        if self._is_joining:
            self._begun += data
            if not text:
                return ""
            self._is_joining = False
            if text.startswith("\ufffd"):
                return self._without_the_prompt()
        return text

    def finish(self) -> str:
        if self._is_joining:
            return self._without_the_prompt() + self._utf8.decode(b"", final=True)
        return self._utf8.decode(b"", final=True)

    def _without_the_prompt(self) -> str:
        """Decode the answer's bytes alone, since the prompt's and they do not make a character."""
        self._utf8.reset()
        return self._utf8.decode(self._begun)


class _WordDecoder:
    """For decoders that depend on neighbors: the last tokens' text with the new token, minus that without it."""

    num_before = 0
    """Always 0: a token that may change text before it is reported to begin where that text does."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-6:])
        self._known = self._decode()
        if self._known.endswith("\ufffd"):  # it could still change, and count as the answer's
            self._tokens, self._known = [], ""

    def step(self, token: int, data: bytes) -> str:
        self._tokens.append(token)
        text = self._decode()
        if text.endswith("\ufffd") and len(self._tokens) < 6 + _LONGEST_CHAR:
            return ""
        new = text[len(self._known) :] if text.startswith(self._known) else data.decode()
        self._tokens = self._tokens[-6:]
        self._known = self._decode()
        return new

    def finish(self) -> str:
        text = self._decode()
        return text[len(self._known) :] if text.startswith(self._known) else ""

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens))
