"""Pack several samples into one row, without padding and with their common prefix once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.data.tokenization import Sample


@dataclass(frozen=True)
class PackedRow:
    """Input of one forward pass: the samples' common prefix, then the rest of each, end to end.

    `input_ids` and `position_ids` are [1, N]; `mask` [1, 1, N, N] is added to attention scores. `targets` [T] are the
    trained tokens, `keep` [T] the positions in the row whose logits predict them, and `owners` [T] the indices of
    their samples.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    keep: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def pack(samples: Sequence[Sample], *, device: torch.device, dtype: torch.dtype) -> PackedRow:
    """Pack samples end to end; each attends to itself and the common prefix only, so losses do not change.

    Chat samples often begin with the same system message. Its keys and values do not depend on what follows, so one
    copy serves all samples of the row, forward and backward. `dtype` is that of attention.
    """
    prefix = common_prefix(samples)
    tokens, positions, owners = list(samples[0].tokens[:prefix]), list(range(prefix)), [-1] * prefix
    keep, targets, owners_of_targets = [], [], []
    for owner, sample in enumerate(samples):
        shift = len(tokens) - prefix
        for place in range(prefix, len(sample.tokens)):
            if sample.trained[place]:
                before = place - 1
                keep.append(before if before < prefix else before + shift)
                targets.append(sample.tokens[place])
                owners_of_targets.append(owner)
        tokens += sample.tokens[prefix:]
        positions += range(prefix, len(sample.tokens))
        owners += [owner] * (len(sample.tokens) - prefix)
    return PackedRow(
        torch.tensor([tokens], device=device),
        torch.tensor([positions], device=device),
        _mask(torch.tensor(owners, device=device), dtype),
        torch.tensor(keep, device=device, dtype=torch.long),
        torch.tensor(targets, device=device, dtype=torch.long),
        torch.tensor(owners_of_targets, device=device, dtype=torch.long),
    )


def common_prefix(samples: Sequence[Sample]) -> int:
    """Return the length of the untrained prefix that all samples share, leaving each at least one token of its own."""
    first = samples[0]
    limit = min(len(sample.tokens) for sample in samples) - 1
    for place in range(limit):
        if any(s.tokens[place] != first.tokens[place] or s.trained[place] for s in samples):
            return place
    return limit


def _mask(owners: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask with 0 where a token may attend (prefix and own sample, not ahead), else the lowest number.

    Additive, since eager attention would silently add a boolean mask as zeros and ones.
    """
    visible = (owners[:, None] == owners[None, :]) | (owners[None, :] < 0)
    mask = torch.zeros(visible.shape, dtype=dtype, device=owners.device)
    return mask.masked_fill(~visible.tril(), torch.finfo(dtype).min)[None, None]
