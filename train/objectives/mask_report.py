"""What the trained marks of a data set come to, counted and shown before the first step. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from adapterhub.errors import DatasetError
from train.data.tokenization import Sample, special_ids
from train.objectives.base import Objective

_NUM_ROWS = 3
_NUM_BINS = 8
_TAIL = 3
"""tokens at a sample's end among which its end-of-turn token is; white space may follow it"""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(_Closed):
    """Text of neighbouring tokens with the same mark."""

    text: str
    is_trained: bool


class Bin(_Closed):
    """Samples of at most `up_to` tokens, and more than the bin before holds."""

    up_to: int
    samples: int


class MaskReport(_Closed):
    samples: int
    held_out: int
    tokens: int
    trained_tokens: int
    cut: int
    untrained: int
    """left out, for no trained token was left in them"""
    ends_trained: int
    """samples in which the token that ends the answer is trained"""
    end_token: str | None
    eos_token: str | None
    begins_twice: int
    """samples that begin with two beginning-of-text tokens"""
    begins_without: int = 0
    """samples without the beginning-of-text token that the tokenizer puts before every text"""
    pad_is_eos: bool
    lengths: list[Bin]
    rows: list[list[Piece]]
    """the first samples as the model sees them"""

    @property
    def summary(self) -> str:
        share = self.trained_tokens / max(1, self.tokens)
        pad = "equals the end of text" if self.pad_is_eos else "is not the end of text"
        return (
            f"{self.trained_tokens:,} of {self.tokens:,} tokens are trained ({share:.0%}); {self.cut} samples cut, "
            f"{self.untrained} without a trained token left out; the end of the answer ({self.end_token}) is trained "
            f"in {self.ends_trained} of {self.samples}; pad {pad} (rows have no padding)"
        )

    @property
    def notes(self) -> list[str]:
        """What a person should know although the run can go on."""
        found = []
        if self.untrained > self.samples:
            found.append(f"more samples were left out ({self.untrained}) than are trained ({self.samples})")
        if self.begins_without:
            found.append(
                f"{self.begins_without} samples do not begin with the beginning of text, which the tokenizer puts "
                "before every text: the base may never have seen one without"
            )
        if self.cut and 0 < self.ends_trained < self.samples:
            found.append(f"{self.samples - self.ends_trained} samples are cut before the end of the answer")
        if self.end_token is not None and self.end_token != self.eos_token:
            found.append(
                f"answers end with {self.end_token}, the tokenizer's end of text is {self.eos_token}: a server must "
                f"stop at {self.end_token}, as the chat template tells it"
            )
        return found

    def check(self) -> None:
        """Raises DatasetError for labels no run could learn from."""
        if not self.ends_trained:
            raise DatasetError(
                f"no sample trains the end of an answer, so the model would never stop ({self.cut} of {self.samples} "
                "are cut): raise max_length."
            )
        if self.begins_twice:
            raise DatasetError(
                f"{self.begins_twice} samples begin with two beginning-of-text tokens: use another base."
            )


def mask_report(objective: Objective, tokenizer: Any) -> MaskReport:
    """Count the training samples of `objective`; texts of a pair count as two."""
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
        # Some templates open every turn with the token that also begins a text: only a doubled one is a fault.
        begins_without=sum(begins and sample.tokens[0] != bos for sample in samples),
        begins_twice=sum(bos is not None and sample.tokens[:2] == (bos, bos) for sample in samples),
        pad_is_eos=tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
        lengths=_histogram([len(sample.tokens) for sample in samples]),
        rows=[_pieces(sample, tokenizer) for sample in samples[:_NUM_ROWS]],
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


def _pieces(sample: Sample, tokenizer: Any) -> list[Piece]:
    pieces: list[Piece] = []
    start = 0
    for place in range(1, len(sample.tokens) + 1):
        if place == len(sample.tokens) or sample.trained[place] != sample.trained[start]:
            text = str(tokenizer.decode(list(sample.tokens[start:place])))
            pieces.append(Piece(text=text, is_trained=sample.trained[start]))
            start = place
    return pieces
