"""Loss on given samples: how training and measuring both call a model. Changes no weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from train.data import Sample
from train.packing import Row, pack

ROW_SAMPLES = 8
"""samples packed together when measuring"""


def row_loss(model: Any, row: Row) -> torch.Tensor:
    """Sum of the negative log-likelihoods (nats, fp32) of the row's targets; logits only where they are needed."""
    logits = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=row.mask,
        use_cache=False,
        logits_to_keep=row.keep,
    ).logits[0]
    return cross_entropy(logits.float(), row.targets, reduction="sum")


def held_out_loss(model: Any, samples: Sequence[Sample]) -> tuple[float, int]:
    """(mean loss per trained token in nats, number of those tokens), in eval mode and without gradients."""
    total, tokens = 0.0, 0
    with _measuring(model):
        for start in range(0, len(samples), ROW_SAMPLES):
            row = pack(samples[start : start + ROW_SAMPLES], device=model.device, dtype=model.dtype)
            total += row_loss(model, row).item()
            tokens += len(row.targets)
    return total / max(1, tokens), tokens


@contextmanager
def _measuring(model: Any) -> Iterator[None]:
    # Not inference_mode: tensors a model caches there (rotary tables) could not take part in training later.
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
