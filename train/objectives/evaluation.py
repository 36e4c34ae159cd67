"""Loss on given samples: how training and measuring both call a model. Changes no weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from train.data.packing import Row, pack
from train.data.tokenization import Sample
from train.objectives.forward import token_losses

_ROW_SAMPLES, _ROW_TOKENS, _ROW_TRAINED = 8, 2048, 512
"""packed together when measuring, at most: samples; their tokens; those of them that need logits, by far the largest
tensors then (a row of 2,048 logits over 128k words takes 1.6 GB). So measuring needs less than a step does."""


def row_loss(model: Any, row: Row) -> torch.Tensor:
    """Sum of the negative log-likelihoods (nats, fp32) of the row's targets."""
    return token_losses(model, row).sum()


def log_likelihoods(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """[S] log-likelihood (nats, fp32) of each sample's trained tokens together, all samples in one row."""
    row = pack(samples, device=model.device, dtype=model.dtype)
    of_tokens = -token_losses(model, row)
    return of_tokens.new_zeros(len(samples)).index_add(0, row.owners, of_tokens)


def rows_to_measure(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """Neighbours together, as many as memory should bear; a sample too long for that stands alone."""
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
    """(mean loss per trained token in nats, number of those tokens), in eval mode and without gradients."""
    total, tokens = 0.0, 0
    with measuring(model):
        for together in rows_to_measure(samples):
            row = pack(together, device=model.device, dtype=model.dtype)
            total += row_loss(model, row).item()
            tokens += len(row.targets)
    return total / max(1, tokens), tokens


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """In eval mode and without gradients; the mode it was in comes back."""
    # Not inference_mode: tensors a model caches there (rotary tables) could not take part in training later.
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
