"""A run that met the end of memory, told which part of its plan to cut. Frees nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from adapterhub.errors import TrainingFailed
from train.planning.plan import MemoryItem

_SMALLER_ROWS = (
    "set activation_checkpointing = true, or halve batch_size and double gradient_accumulation (the result is the "
    "same), or lower max_length"
)
_CUTS = {
    "base, 4-bit codes": "train on a smaller base, or divide this one: --launch N --shard",
    "weights left unquantized": 'set kind = "nf4" in [quantization] if it is not set, or train on a smaller base',
    "adapter, fp32": "lower rank, or name fewer targets",
    "gradients, fp32": "lower rank, or name fewer targets",
    "optimizer": 'set optimizer = "paged-adamw-8bit", or lower rank',
    "activations": _SMALLER_ROWS,
    "attention mask": _SMALLER_ROWS,
    "logits": _SMALLER_ROWS,
}
"""memory item -> what makes it smaller"""


@contextmanager
def memory_errors_named(planned: Sequence[MemoryItem]) -> Iterator[None]:
    """Raises TrainingFailed, with what of the plan to cut, when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class for CUDA only; on a CPU its allocator raises a plain RuntimeError.
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        raise TrainingFailed(f"memory ran out; {what_to_cut(planned)}.") from error


def what_to_cut(items: Sequence[MemoryItem]) -> str:
    """The plan's largest item that a recipe can make smaller, and how."""
    name, size = max(((item.name, item.size_bytes) for item in items if item.name in _CUTS), key=lambda one: one[1])
    total = sum(item.size_bytes for item in items)
    return f"of the {total / 1e9:.2f} GB planned, {size / 1e9:.2f} GB are for {name}: {_CUTS[name]}"
