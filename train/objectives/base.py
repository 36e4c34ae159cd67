"""What a run minimises and how that is measured; learning to write the data's answers. Moves no weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub.package.manifest import Evaluation
from train.data.preferences import Comparisons
from train.data.tokenization import Sample, TokenData


@dataclass(frozen=True)
class EvalResult:
    """What a model makes of what was held out."""

    loss: float
    """the objective's own"""
    nats_per_token: float
    tokens: int
    """tokens `nats_per_token` is the mean over; 0: nothing is held out"""
    accuracy: float | None = None
    """share of held-out pairs whose desirable reply is the likelier one, per token"""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.nats_per_token)


class Objective(Protocol):
    """Data and loss of a run. Places are indices into its training samples; what data say of themselves is here."""

    _data: TokenData | Comparisons

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
        """(samples cut, samples without a trained token)"""
        return self._data.num_cut, self._data.num_untrained

    @property
    def longest(self) -> int:
        """tokens of the longest sample"""

    def lengths(self) -> list[int]:
        """tokens of each training sample"""

    def describe(self) -> str: ...

    def samples_at(self, place: int) -> Sequence[Sample]:
        """What the model sees of one training sample: one text, or a pair."""

    def set_reference(self, model: Any) -> None:
        """Called once, with the model as training starts from it."""

    def backward(self, model: Any, batches: Sequence[Sequence[int]]) -> float:
        """Gradients of the mean loss over all batches together, which is returned."""

    def measure(self, model: Any) -> EvalResult: ...

    def evaluations(self, *, base: EvalResult, before: EvalResult, after: EvalResult) -> list[Evaluation]:
        """In the record's words: the bare base, what training started from, and the result."""
