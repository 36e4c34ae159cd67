"""Count and show which tokens of a data set are trained, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterhub.end_of_turn import special_ids
from adapterhub.errors import DatasetError
from adapterhub.strict import Strict
from train.data.tokenization import Sample
from train.objectives.base import Objective

_NUM_ROWS = 3
_NUM_BINS = 8
_TAIL = 3
"""Number of last tokens searched for the end-of-turn token; white space may follow it."""


class TextSpan(Strict):
    """Text of neighboring tokens that are all trained, or all not."""

    text: str
    is_trained: bool


class Bin(Strict):
    """Bin of a length histogram: samples of at most `up_to` tokens, and more than those of the bin before."""

    up_to: int
    samples: int


class MaskReport(Strict):
    """Counts of trained tokens and of what may be wrong with the masks."""

    samples: int
    held_out: int
    tokens: int
    trained_tokens: int
    cut: int
    untrained: int
    """Number of samples left out because no trained token remained."""
    ends_trained: int
    """Number of samples in which the token that ends the answer is trained."""
    end_token: str | None
    eos_token: str | None
    begins_twice: int
    """Number of samples that begin with two BOS tokens."""
    begins_without: int = 0
    """Number of samples without the BOS token that the tokenizer puts before every text."""
    pad_is_eos: bool
    lengths: list[Bin]
    rows: list[list[TextSpan]]
    """First samples as the model sees them."""

    @property
    def summary(self) -> str:
        """The counts in one line."""
        share = self.trained_tokens / max(1, self.tokens)
        pad = "equals EOS" if self.pad_is_eos else "differs from EOS"
        return (
            f"{self.trained_tokens:,} of {self.tokens:,} tokens are trained ({share:.0%}); {self.cut} samples cut, "
            f"{self.untrained} without a trained token left out; the end of the answer ({self.end_token}) is trained "
            f"in {self.ends_trained} of {self.samples}; pad {pad} (rows have no padding)"
        )

    @property
    def notes(self) -> list[str]:
        """Warnings about masks that do not stop the run."""
        found = []
        if self.untrained > self.samples:
            found.append(f"more samples were left out ({self.untrained}) than are trained ({self.samples})")
        if self.begins_without:
            found.append(
                f"{self.begins_without} samples do not begin with BOS, which the tokenizer puts before every text: "
                "the base may never have seen a text without it"
            )
        if self.cut and 0 < self.ends_trained < self.samples:
            found.append(f"{self.samples - self.ends_trained} samples are cut before the end of the answer")
        if self.end_token is not None and self.end_token != self.eos_token:
            found.append(
                f"answers end with {self.end_token}, but EOS of the tokenizer is {self.eos_token}: the package records "
                f"{self.end_token}, and servers stop at it"
            )
        return found

    def check(self) -> None:
        """Check that a run can learn from these masks. Raises DatasetError."""
        if not self.ends_trained:
            raise DatasetError(
                f"no sample trains the end of an answer ({self.cut} of {self.samples} are cut): expected some, or the "
                "model would never stop. Raise max_length in [data]."
            )
        if self.begins_twice:
            raise DatasetError(
                f"{self.begins_twice} samples begin with two BOS tokens: expected one. Use another base."
            )


def mask_report(objective: Objective, tokenizer: Any) -> MaskReport:
    """Count the trained tokens of `objective`; the two texts of a pair count as two samples."""
    samples = [sample for place in range(objective.num_samples) for sample in objective.samples_at(place)]
    special = special_ids(tokenizer)
    ends = [end for sample in samples if (end := _trained_end(sample, special)) is not None]
    cut, untrained = objective.num_left_out
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return MaskReport(
        samples=len(samples),
        held_out=objective.num_held_out,
        tokens=sum(len(sample.tokens) for sample in samples),
        trained_tokens=sum(sample.num_trained for sample in samples),
        cut=cut,
        untrained=untrained,
        ends_trained=len(ends),
        end_token=str(tokenizer.decode([ends[0]])) if ends else None,
        eos_token=tokenizer.eos_token,
        # Some templates open every turn with BOS: only a doubled one is a fault.
        begins_without=sum(begins and sample.tokens[0] != bos for sample in samples),
        begins_twice=sum(bos is not None and sample.tokens[:2] == (bos, bos) for sample in samples),
        pad_is_eos=tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
        lengths=_histogram([len(sample.tokens) for sample in samples]),
        rows=[_spans(sample, tokenizer) for sample in samples[:_NUM_ROWS]],
    )


def _trained_end(sample: Sample, special: frozenset[int]) -> int | None:
    tail = zip(reversed(sample.tokens[-_TAIL:]), reversed(sample.trained[-_TAIL:]), strict=True)
    return next((token for token, mark in tail if mark and token in special), None)


def _histogram(lengths: Sequence[int]) -> list[Bin]:
    longest = max(lengths)
    width = -(-longest // _NUM_BINS)
    counts = [0] * _NUM_BINS
    for length in lengths:
        counts[(length - 1) // width] += 1
    return [Bin(up_to=width * (place + 1), samples=count) for place, count in enumerate(counts)]


def _spans(sample: Sample, tokenizer: Any) -> list[TextSpan]:
    spans: list[TextSpan] = []
    start = 0
    for place in range(1, len(sample.tokens) + 1):
        if place == len(sample.tokens) or sample.trained[place] != sample.trained[start]:
            text = str(tokenizer.decode(list(sample.tokens[start:place])))
            spans.append(TextSpan(text=text, is_trained=sample.trained[start]))
            start = place
    return spans
