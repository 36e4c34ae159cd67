"""An answer on its way out: from each chosen token to the chunk that shows what has become certain. Knows no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from serve.engine import Chunk, FinishReason, GenerationRequest, TokenLogprob
from serve.local_engine.block_pool import Sequence
from serve.local_engine.detokenizer import TextStream
from serve.local_engine.guided_decoding import Matcher
from serve.local_engine.sampling import Row, Sampled

Emit = Callable[[Chunk | Exception], None]


class RunningAnswer:
    """What the engine holds of a request while it is answered; compared by identity."""

    def __init__(self, request: GenerationRequest, tokenizer: Any, matcher: Matcher | None, emit: Emit) -> None:
        """`tokenizer`: of the tokenizers library."""
        self.sequence = Sequence.of(request)
        self.matcher = matcher
        self.emit = emit
        self.row: Row | None = None
        """logits that wait for the matcher's mask"""
        self._text = TextStream(tokenizer, request.sampling.stop, request.prompt)
        self._logprobs: deque[TokenLogprob] = deque()
        """of tokens whose text is held back"""

    def chunk(self, sampled: Sampled, eos: Collection[int]) -> Chunk:
        """The piece that the newest token, the sequence's last, adds; `eos` are the tokens that end an answer."""
        params = self.sequence.request.sampling
        num_tokens = len(self.sequence.tokens) - len(self.sequence.request.prompt)
        text = ""
        if sampled.token in params.stop_token_ids or (sampled.token in eos and not params.ignore_eos):
            reason: FinishReason | None = FinishReason.STOP
        else:
            noted = self._logprob(sampled)
            text = self._text.feed(sampled.token)
            if noted is not None:
                self._logprobs.append(replace(noted, offset=self._text.offset))
            is_full = num_tokens >= params.max_tokens
            reason = FinishReason.STOP if self._text.is_stopped else FinishReason.LENGTH if is_full else None
        if reason is not None:
            text += self._text.finish()
            reason = FinishReason.STOP if self._text.is_stopped else reason
        logprobs = self._certain_logprobs(is_last=reason is not None)
        return Chunk(text, num_tokens, (sampled.token,), reason, logprobs, self.sequence.num_cached_tokens)

    def _logprob(self, sampled: Sampled) -> TokenLogprob | None:
        """Of a token that is not in the text yet: names depend on where it stands, and its place is known after."""
        if sampled.logprob is None:
            return None
        name = self._text.name
        top = tuple(TokenLogprob(token, *name(token), logprob) for token, logprob in sampled.top)
        return TokenLogprob(sampled.token, *name(sampled.token), sampled.logprob, top)

    def _certain_logprobs(self, *, is_last: bool) -> tuple[TokenLogprob, ...]:
        """Those of tokens whose text was given; at the end all, but for those that a stop string took."""
        found = []
        are_all_certain = is_last and not self._text.is_stopped
        while self._logprobs and (are_all_certain or self._logprobs[0].offset < self._text.num_given):
            found.append(self._logprobs.popleft())
        return tuple(found)
