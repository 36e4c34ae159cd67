"""Compute losses of given samples, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from train.data.packing import PackedRow, pack
from train.data.tokenization import Sample
from train.objectives.forward import row_support, rows_of, token_losses

_ROW_SAMPLES, _ROW_TOKENS, _ROW_TRAINED = 8, 2048, 512
"""Limits of a row in evaluation: samples, tokens, and tokens with logits, by far the largest tensors (2,048 rows of
logits over a vocabulary of 128k take 1.6 GB). So an evaluation needs less memory than a step."""


def row_loss(model: Any, row: PackedRow) -> torch.Tensor:
    """Return the sum of the negative log-likelihoods (nats, fp32) of the row's targets."""
    return token_losses(model, row).sum()


def packed_rows(model: Any, samples: Sequence[Sample]) -> Iterator[PackedRow]:
    """Yield the samples packed into one row, or into as many as the model needs to compute each as alone."""
    for places in rows_of(row_support(model), samples):
        yield pack([samples[place] for place in places], device=model.device)


def log_likelihoods(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """Return [S], the log-likelihood (nats, fp32) of each sample's trained tokens, computed in one row if possible."""
    found = torch.zeros(len(samples), device=model.device)
    for places in rows_of(row_support(model), samples):
        row = pack([samples[place] for place in places], device=model.device)
        owners = torch.tensor(places, device=model.device)[row.owners]
        found = found.index_add(0, owners, -token_losses(model, row))
    return found


def eval_rows(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """Group neighbors into rows within the limits of memory; a sample beyond them is a row of its own."""
    row: list[Sample] = []
    for sample in samples:
        grown = [*row, sample]
        if row and (
            len(grown) > _ROW_SAMPLES
            or sum(len(one.tokens) for one in grown) > _ROW_TOKENS
            or sum(one.num_trained for one in grown) > _ROW_TRAINED
        ):
            yield row
            grown = [sample]
        row = grown
    if row:
        yield row


def held_out_loss(model: Any, samples: Sequence[Sample]) -> tuple[float, int]:
    """Return (mean loss per trained token in nats, number of those tokens), in eval mode and without gradients."""
    total, tokens = 0.0, 0
    with eval_mode(model):
        for together in eval_rows(samples):
            for row in packed_rows(model, together):
                total += row_loss(model, row).item()
                tokens += len(row.targets)
    return total / max(1, tokens), tokens


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Set eval mode without gradients; restore the model's mode at the end."""
    # Not inference_mode: tensors that a model caches there (rotary tables) could not take part in training later.
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
