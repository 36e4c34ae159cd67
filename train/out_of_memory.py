"""A run that met the end of memory, told which part of its plan to cut. Frees nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from adapterhub.base_model import choose_precision
from adapterhub.base_store import StoredBase
from adapterhub.errors import TrainingFailed
from train.distributed import current_world
from train.objective import Objective
from train.plan import MemoryItem, planned_memory
from train.recipe import Recipe

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
def memory_errors_named(recipe: Recipe, base: StoredBase, objective: Objective) -> Iterator[None]:
    """Raises TrainingFailed, with what to cut, when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class for CUDA only; on a CPU its allocator raises a plain RuntimeError.
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        device, dtype = choose_precision(recipe.base_arguments()["dtype"], current_world().device)
        items = planned_memory(recipe, base, objective, device=device.value, dtype=dtype.value)
        raise TrainingFailed(f"memory ran out; {what_to_cut(items)}.") from error


def what_to_cut(items: Sequence[MemoryItem]) -> str:
    """The plan's largest item that a recipe can make smaller, and how."""
    name, size = max(((item.name, item.size_bytes) for item in items if item.name in _CUTS), key=lambda one: one[1])
    total = sum(item.size_bytes for item in items)
    return f"of the {total / 1e9:.2f} GB planned, {size / 1e9:.2f} GB are for {name}: {_CUTS[name]}"
