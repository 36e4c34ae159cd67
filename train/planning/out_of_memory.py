"""Advice for a run that ran out of memory: which part of its plan to make smaller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from adapterhub.errors import TrainingFailed
from adapterhub.memory.estimate import Item, total
from adapterhub.units import format_bytes

_SMALLER_ROWS = (
    "set activation_checkpointing = true, or halve batch_size and double gradient_accumulation (the result is the "
    "same), or lower max_length"
)
_FEWER_WEIGHTS = "lower rank, or name fewer targets"
_QUANTIZE = 'set kind = "nf4" in [quantization], or train on a smaller base'
_SHARD = "train on a smaller base, or divide this one: --launch N --shard"
_CUTS = {
    "base, 4-bit codes": _SHARD,
    "base, 8-bit codes": _QUANTIZE,
    "base, 16-bit": _QUANTIZE,
    "base, 32-bit": _QUANTIZE,
    "embedding, head and norms": "train on a smaller base",
    "trained weights, fp32": 'set method = "lora"',
    "adapter, fp32": _FEWER_WEIGHTS,
    "gradients, fp32": _FEWER_WEIGHTS,
    "optimizer": 'set optimizer = "paged-adamw-8bit", or lower rank',
    "optimizer, paged": 'set optimizer = "paged-adamw-8bit", or lower rank',
    "activations": _SMALLER_ROWS,
    "attention mask": _SMALLER_ROWS,
    "logits": _SMALLER_ROWS,
    "one layer's backward pass": _SMALLER_ROWS,
}
"""Item of the memory estimate -> what makes it smaller."""


@contextmanager
def memory_errors_named(planned: Sequence[Item]) -> Iterator[None]:
    """Convert running out of memory into TrainingFailed, which names the part of the plan to make smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class for CUDA only; on a CPU its allocator raises a plain RuntimeError.
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        raise TrainingFailed(f"memory ran out; {what_to_cut(planned)}.") from error


def what_to_cut(items: Sequence[Item]) -> str:
    """Return the plan's largest item that a recipe can make smaller, and how."""
    largest = max((item for item in items if item.name in _CUTS), key=lambda item: item.size_bytes)
    return (
        f"of the {format_bytes(total(items))} planned, {format_bytes(largest.size_bytes)} are for {largest.name}: "
        f"{_CUTS[largest.name]}"
    )
