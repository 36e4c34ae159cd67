"""From tokens to text, piece by piece: whole characters only, and stop strings found across pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer as it grows; text that may be the start of a stop string is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt: Sequence[int]) -> None:
        # The prompt's end gives the decoder its context: whether a first space is text or a word border.
        self._decoder = DecodeStream(list(prompt[-6:]), skip_special_tokens=True)
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False

    def feed(self, token: int) -> str:
        """Text that is now certain. Sets `is_stopped` when a stop string is complete (it is not returned)."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            return self._take(min(found))
        return self._take(len(self._held) - self._possible_stop_length())

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.is_stopped else self._take(len(self._held))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
