"""Sample next tokens from logits: one vectorized path for greedy rows, one row at a time for the rest."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from adapterhub.errors import ConstraintFailed, NonFiniteLogits
from serve.engine import SamplingParams
from serve.local_engine.guided_decoding import Matcher
from serve.local_engine.scheduler import Sequence

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: fp32 could not distinguish them."""

_LEAST_LOGPROB = -9999.0
"""Log-probability that OpenAI and vLLM report for an impossible token: JSON has no infinity."""


@dataclass(frozen=True)
class SamplingRow:
    """The logits of one sequence's next token."""

    logits: torch.Tensor
    """Logits, fp32 [vocabulary]."""
    best: int
    peak: float
    """The largest logit: NaN or Inf where any of them is NaN or +Inf, -Inf where all are."""


def rows_of(logits: torch.Tensor) -> list[SamplingRow]:
    """Split logits [n, vocabulary] fp32 into rows; argmax and maximum are computed for all of them at once."""
    peaks, best = logits.max(-1)
    return [SamplingRow(*one) for one in zip(logits, best.tolist(), peaks.tolist(), strict=True)]


@dataclass(frozen=True)
class Sampled:
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Samples tokens, with a random state per request, so that neighbors do not disturb it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generators: dict[str, torch.Generator] = {}

    def sample(self, row: SamplingRow, sequence: Sequence, matcher: Matcher | None = None) -> Sampled:
        """Choose the next token; `matcher` restricts it, and accepts the one chosen.

        Raises NonFiniteLogits, and ConstraintFailed where the matcher allows no token.
        """
        if not math.isfinite(row.peak):
            raise NonFiniteLogits(_why_not_finite(sequence))
        params = sequence.request.sampling
        altered = _altered(row.logits, sequence, params)
        if matcher is not None:
            altered = matcher.restrict(altered)
        if altered is row.logits and params.temperature < GREEDY_BELOW:
            token = row.best
        else:
            token = self._choose(altered, sequence)
        if matcher is not None:
            matcher.accept(token)
        if params.top_logprobs is None:
            return Sampled(token)
        # Of the model's own distribution, before bias, penalties and masks, as OpenAI reports them.
        logprobs = row.logits.log_softmax(-1).clamp_min(_LEAST_LOGPROB)
        top = logprobs.topk(min(params.top_logprobs, logprobs.numel())) if params.top_logprobs else None
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
        return Sampled(token, float(logprobs[token]), pairs)

    def forget(self, request_id: str) -> None:
        self._generators.pop(request_id, None)

    def _choose(self, logits: torch.Tensor, sequence: Sequence) -> int:
        params = sequence.request.sampling
        (row,) = rows_of(logits[None])
        if row.peak == -math.inf:
            raise ConstraintFailed("the model's vocabulary has no token that may come next in the answer.")
        if params.temperature < GREEDY_BELOW or not math.isfinite(row.peak):
            return row.best
        probabilities = filtered(logits, params)
        return int(torch.multinomial(probabilities, 1, generator=self._generator(sequence)))

    def _generator(self, sequence: Sequence) -> torch.Generator | None:
        seed = sequence.request.sampling.seed
        if seed is None:
            return None
        if sequence.request.id not in self._generators:
            self._generators[sequence.request.id] = torch.Generator(self._device).manual_seed(seed)
        return self._generators[sequence.request.id]


def _why_not_finite(sequence: Sequence) -> str:
    digests = [adapter.digest for adapter in sequence.request.adapters]
    who = f"the base with adapter {' and '.join(digests)}" if digests else "the base"
    return (
        f"{who} computes NaN or Inf for token {len(sequence.answer) + 1} of the answer: its numbers overflow. "
        f"{'Ask with a smaller scale, or train the adapter again' if digests else 'Serve it in another dtype'}."
    )


def _altered(logits: torch.Tensor, sequence: Sequence, params: SamplingParams) -> torch.Tensor:
    """Return [vocabulary] with bias and penalties; the same tensor when there are none."""
    if params.logit_bias:
        logits = logits.clone()
        for token, bias in params.logit_bias:
            logits[token] += bias
    if has_penalties(params):
        logits = penalized(logits, sequence, params)
    return logits


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def penalized(logits: torch.Tensor, sequence: Sequence, params: SamplingParams) -> torch.Tensor:
    """Return [vocabulary] with repetition (prompt and answer), presence and frequency penalties (answer).

    Values that overflow fp32 become its largest number.
    """
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        chosen = logits[seen]
        factor = params.repetition_penalty
        changed = torch.where(chosen > 0, chosen / factor, chosen * factor)
        logits[seen] = changed.nan_to_num(0.0, neginf=-math.inf)
    if sequence.answer and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(sequence.answer)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[torch.tensor(list(counts), device=logits.device)] -= (
            params.presence_penalty + params.frequency_penalty * times
        )
    return logits


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return probabilities [vocabulary] after temperature, top-k, top-p and min-p; the best token always stays."""
    # The largest is subtracted first, so that no temperature overflows.
    logits = (logits - logits.max()) / max(params.temperature, GREEDY_BELOW)
    if 0 < params.top_k < logits.numel():
        weakest = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    probabilities = logits.softmax(-1)
    if params.top_p < 1.0:
        values, order = probabilities.sort(descending=True)
        # A token stays while the mass before it is below p.
        drop = order[1:][values.cumsum(0)[:-1] >= params.top_p]
        probabilities[drop] = 0.0
    if params.min_p > 0.0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
    return probabilities
