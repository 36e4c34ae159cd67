"""An answer while it is generated: turns each chosen token into the delta to send. Knows no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from serve.engine import Delta, FinishReason, GenerationRequest, TokenLogprob
from serve.local_engine.block_pool import Sequence
from serve.local_engine.detokenizer import Detokenizer
from serve.local_engine.guided_decoding import Matcher
from serve.local_engine.sampling import Sampled, SamplingRow

Emit = Callable[[Delta | Exception], None]


class RunningAnswer:
    """The engine's state of a request while it is answered; compared by identity."""

    def __init__(self, request: GenerationRequest, tokenizer: Any, matcher: Matcher | None, emit: Emit) -> None:
        """Begin an answer; `tokenizer` is of the tokenizers library."""
        self.sequence = Sequence.of(request)
        self.matcher = matcher
        self.emit = emit
        self.row: SamplingRow | None = None
        """Logits that wait for the matcher's mask."""
        self._text = Detokenizer(tokenizer, request.sampling.stop, request.prompt)
        self._logprobs: deque[TokenLogprob] = deque()
        """Log-probabilities of tokens whose text is held back."""

    def delta(self, sampled: Sampled, eos: Collection[int]) -> Delta:
        """Return the delta of the sequence's newest token; `eos` are the tokens that end an answer."""
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
        return Delta(text, num_tokens, (sampled.token,), reason, logprobs, self.sequence.num_cached_tokens)

    def _logprob(self, sampled: Sampled) -> TokenLogprob | None:
        """Return the entry of a token that is not in the text yet, on which names depend; its offset is set later."""
        if sampled.logprob is None:
            return None
        name = self._text.name
        top = tuple(TokenLogprob(token, *name(token), logprob) for token, logprob in sampled.top)
        return TokenLogprob(sampled.token, *name(sampled.token), sampled.logprob, top)

    def _certain_logprobs(self, *, is_last: bool) -> tuple[TokenLogprob, ...]:
        """Take the entries of tokens whose text was returned; at the end all, but those a stop string removed."""
        found = []
        are_all_certain = is_last and not self._text.is_stopped
        while self._logprobs and (are_all_certain or self._logprobs[0].offset < self._text.num_given):
            found.append(self._logprobs.popleft())
        return tuple(found)
