"""The interface of a run's objective, and the result of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub.package.manifest import Evaluation
from train.data.preferences import PreferenceData
from train.data.tokenization import Sample, TokenData


@dataclass(frozen=True)
class EvalResult:
    """Held-out loss and pair accuracy of a model."""

    loss: float
    """Held-out loss of the objective."""
    nats_per_token: float
    """Mean negative log-likelihood, in nats per token."""
    tokens: int
    """Number of tokens that `nats_per_token` averages over; 0: nothing is held out."""
    accuracy: float | None = None
    """Pair accuracy: share of held-out pairs whose chosen reply has the higher log-likelihood per token."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.nats_per_token)


class Objective(Protocol):
    """Data and loss of a run. A place is an index into its training samples."""

    _data: TokenData | PreferenceData

    @property
    def num_samples(self) -> int:
        return len(self._data.train)

    @property
    def digest(self) -> str:
        return self._data.digest

    @property
    def notes(self) -> Sequence[str]:
        return self._data.notes

    @property
    def num_held_out(self) -> int:
        return len(self._data.held_out)

    @property
    def num_left_out(self) -> tuple[int, int]:
        """Number of samples that were cut, and of those without a trained token."""
        return self._data.num_cut, self._data.num_untrained

    @property
    def longest(self) -> int:
        """Length of the longest sample, in tokens."""

    def lengths(self) -> list[int]:
        """Return the length of each training sample, in tokens."""

    def describe(self) -> str:
        """Return one line about data and method, for the progress output."""

    def samples_at(self, place: int) -> Sequence[Sample]:
        """Return the texts of one training sample: one, or the two of a pair."""

    def set_reference(self, model: Any) -> None:
        """Record the reference model's log-likelihoods; called once, before the first step."""

    def backward(self, model: Any, batches: Sequence[Sequence[int]]) -> float:
        """Compute gradients of the mean loss over all batches together, and return that loss."""

    def evaluate(self, model: Any) -> EvalResult:
        """Evaluate the model on the held-out samples."""

    def evaluations(self, *, base: EvalResult, before: EvalResult, after: EvalResult) -> list[Evaluation]:
        """Return the entries of the run record: base, start of training, and result."""
