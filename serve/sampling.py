"""Choosing next tokens from logits: one vectorised path for greedy rows, one row at a time for the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from serve.constrained import Constraints, Matcher
from serve.engine import SamplingParams
from serve.scheduler import Sequence


@dataclass(frozen=True)
class Sampled:
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Holds the random state and the constraint of each request, so that neighbours do not disturb it."""

    def __init__(self, device: torch.device, constraints: Constraints) -> None:
        self._device = device
        self._constraints = constraints
        self._generators: dict[str, torch.Generator] = {}
        self._matchers: dict[str, Matcher] = {}

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
        """logits [n, vocabulary] fp32, one row per sequence."""
        best = logits.argmax(-1).tolist()
        return [
            self._sample_one(row, sequence, greedy)
            for row, sequence, greedy in zip(logits, sequences, best, strict=True)
        ]

    def forget(self, request_id: str) -> None:
        self._generators.pop(request_id, None)
        self._matchers.pop(request_id, None)

    def _sample_one(self, logits: torch.Tensor, sequence: Sequence, greedy: int) -> Sampled:
        params = sequence.request.sampling
        matcher = self._matcher(sequence)
        altered = _altered(logits, sequence, params)
        if matcher is not None:
            altered = matcher.restrict(altered)
        if params.temperature > 0:
            token = self._draw(altered, sequence)
        else:
            token = greedy if altered is logits else int(altered.argmax())
        if matcher is not None:
            matcher.accept(token)
        if params.top_logprobs is None:
            return Sampled(token)
        # Of the model's own distribution, before anything the request changes about it, as OpenAI reports them.
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(params.top_logprobs) if params.top_logprobs else None
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
        return Sampled(token, float(logprobs[token]), pairs)

    def _matcher(self, sequence: Sequence) -> Matcher | None:
        constraint, name = sequence.request.sampling.constraint, sequence.request.id
        if constraint is not None and name not in self._matchers:
            self._matchers[name] = self._constraints.matcher(constraint)
        return self._matchers.get(name)

    def _draw(self, logits: torch.Tensor, sequence: Sequence) -> int:
        probabilities = filtered(logits, sequence.request.sampling)
        return int(torch.multinomial(probabilities, 1, generator=self._generator(sequence)))

    def _generator(self, sequence: Sequence) -> torch.Generator | None:
        seed = sequence.request.sampling.seed
        if seed is None:
            return None
        if sequence.request.id not in self._generators:
            self._generators[sequence.request.id] = torch.Generator(self._device).manual_seed(seed)
        return self._generators[sequence.request.id]


def _altered(logits: torch.Tensor, sequence: Sequence, params: SamplingParams) -> torch.Tensor:
    """[vocabulary] with bias and penalties; the same tensor when there are none."""
    if params.logit_bias:
        logits = logits.clone()
        for token, bias in params.logit_bias:
            logits[token] += bias
    return penalized(logits, sequence, params) if has_penalties(params) else logits


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def penalized(logits: torch.Tensor, sequence: Sequence, params: SamplingParams) -> torch.Tensor:
    """[vocabulary] with repetition (prompt and answer), presence and frequency penalties (answer) applied."""
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        chosen = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(chosen > 0, chosen / factor, chosen * factor)
    if sequence.answer and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(sequence.answer)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[torch.tensor(list(counts), device=logits.device)] -= (
            params.presence_penalty + params.frequency_penalty * times
        )
    return logits


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [vocabulary] after temperature, top-k, top-p and min-p."""
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        weakest = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    probabilities = logits.softmax(-1)
    if params.top_p < 1.0:
        values, order = probabilities.sort(descending=True)
        # A token stays while the mass before it is below p: the best one always does.
        drop = order[values.cumsum(0) - values >= params.top_p]
        probabilities[drop] = 0.0
    if params.min_p > 0.0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
    return probabilities
