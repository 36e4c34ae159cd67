"""Supervised fine-tuning: the mean negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterhub.package.manifest import Evaluation
from train.data.tokenization import Sample, TokenData
from train.objectives.base import EvalResult, Objective
from train.objectives.evaluation import held_out_loss, packed_rows, row_loss


class SftObjective(Objective):
    """Objective of supervised fine-tuning."""

    _data: TokenData

    def __init__(self, data: TokenData) -> None:
        self._data = data

    @property
    def longest(self) -> int:
        return max(len(sample.tokens) for sample in (*self._data.train, *self._data.held_out))

    def lengths(self) -> list[int]:
        return [len(sample.tokens) for sample in self._data.train]

    def describe(self) -> str:
        data = self._data
        return (
            f"{data.name}: {len(data.train)} samples to train on ({data.num_tokens:,} tokens, {data.num_trained:,} "
            f"trained), {len(data.held_out)} held out"
        )

    def samples_at(self, place: int) -> Sequence[Sample]:
        return (self._data.train[place],)

    def set_reference(self, model: Any) -> None:
        pass

    def backward(self, model: Any, batches: Sequence[Sequence[int]]) -> float:
        """Compute gradients of the mean over all trained tokens, not of the mean over batches' means."""
        rows = [[self._data.train[place] for place in places] for places in batches]
        num_trained = sum(sample.num_trained for row in rows for sample in row)
        total = 0.0
        for row in (packed for samples in rows for packed in packed_rows(model, samples)):
            loss = row_loss(model, row) / num_trained
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def evaluate(self, model: Any) -> EvalResult:
        loss, tokens = held_out_loss(model, self._data.held_out)
        return EvalResult(loss, loss, tokens)

    def evaluations(self, *, base: EvalResult, before: EvalResult, after: EvalResult) -> list[Evaluation]:
        if not after.tokens:
            return []
        name = f"{self._data.name}, {len(self._data.held_out)} held-out questions"
        base_loss, adapter_loss = round(base.loss, 4), round(after.loss, 4)
        return [Evaluation(data=name, tokens=after.tokens, base_loss=base_loss, adapter_loss=adapter_loss)]
