"""Pack several samples into one row, without padding and with their common prefix once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapterhub.bases.capabilities import layer_kinds
from train.data.tokenization import Sample


@dataclass(frozen=True)
class PackedRow:
    """Input of one forward pass: the samples' common prefix, then the rest of each, end to end.

    `input_ids` and `position_ids` are [1, N]. `segments` [N] are the indices of the tokens' samples, -1 for the common
    prefix. `targets` [T] are the trained tokens, `keep` [T] the positions in the row whose logits predict them, and
    `owners` [T] the indices of their samples.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    keep: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def pack(samples: Sequence[Sample], *, device: torch.device) -> PackedRow:
    """Pack samples end to end; under `row_mask` each attends to itself and the common prefix, so losses do not change.

    Chat samples often begin with the same system message. Its keys and values do not depend on what follows, so one
    copy serves all samples of the row, forward and backward.
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
        torch.tensor(owners, device=device),
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


def row_masks(
    config: Any, segments: torch.Tensor, positions: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the mask of a packed row as a model with this text config takes it: one, or one per kind of layer.

    `segments` [N] and `positions` [N] are those of PackedRow. Kinds of layers and their windows are those of
    transformers' `create_masks_for_generate`. Where no window is shorter than the samples, one mask serves all layers.
    """
    longest = int(positions.max()) + 1
    kinds = set(layer_kinds(config))
    if not kinds:  # all layers are of one kind, with a window where the config has one
        kinds = {"sliding_attention" if getattr(config, "sliding_window", None) else "chunked_attention"}
    limits = {kind: _limit(config, kind, longest) for kind in sorted(kinds)}
    masks = {kind: row_mask(segments, positions, dtype=dtype, **limit) for kind, limit in limits.items()}
    is_one = len(masks) == 1 or not any(limits.values())
    return next(iter(masks.values())) if is_one else masks


def _limit(config: Any, kind: str, longest: int) -> dict[str, int]:
    """Return the argument of `row_mask` for a kind of layers, or none if it takes nothing from the longest sample."""
    name, attribute = {
        "sliding_attention": ("window", "sliding_window"),
        "chunked_attention": ("chunk", "attention_chunk_size"),
    }.get(kind, ("", ""))
    size = getattr(config, attribute, None) if name else None
    return {name: size} if size and size < longest else {}


def row_mask(
    segments: torch.Tensor,
    positions: torch.Tensor,
    *,
    dtype: torch.dtype,
    window: int | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return a mask [1, 1, N, N] with 0 where a token may attend, else the lowest number of `dtype`.

    A token attends to itself and to what is before it in its own sample and in the common prefix (`segments` [N] as in
    PackedRow). By `positions` [N] in the sample, it attends only to the last `window` tokens, or to those in the same
    `chunk` of that many tokens. The mask is additive, since eager attention would silently add a boolean mask as zeros
    and ones.
    """
    visible = ((segments[:, None] == segments[None, :]) | (segments[None, :] < 0)).tril()
    if window is not None:
        visible &= positions[:, None] - positions[None, :] < window
    if chunk is not None:
        visible &= positions[:, None] // chunk == positions[None, :] // chunk
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None]
