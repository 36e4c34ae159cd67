"""A plugin for vLLM's CPU build, version 0.32.0: LoRA by groups of rows. Runs in vLLM's processes, not in ours.

Without it, rows without an adapter (index -1) take the weights of the last slot, and every row gathers its own copy of
its adapter. Here each adapter's rows are one product, and rows without an adapter are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MADE_FOR = "0.32.0"


def _rows_of_each(indices: Any) -> Iterator[tuple[int, Any]]:
    """Yield (slot, its rows) for the slots in use."""
    for slot in indices.unique().tolist():
        if slot >= 0:
            yield slot, (indices == slot).nonzero(as_tuple=True)[0]


def _weight(stacked: Any, slot: int) -> Any:
    weight = stacked[slot]
    return weight[0] if weight.dim() == 3 else weight


def bgmv_shrink(inputs: Any, stacked: Any, out: Any, indices: Any, scaling: float = 1.0) -> None:
    """Compute out [rows, >= rank] = scaling * inputs [rows, in] A^T, A [slots, (1,) rank, in]."""
    rank = stacked.shape[-2]
    out[:, :rank] = 0
    for slot, rows in _rows_of_each(indices):
        out[rows, :rank] = scaling * (inputs[rows].to(out.dtype) @ _weight(stacked, slot).to(out.dtype).T)


def bgmv_expand(inputs: Any, stacked: Any, out: Any, indices: Any, add_inputs: bool = True) -> None:
    """Compute out [rows, >= width] (+)= inputs [rows, rank] B^T, B [slots, (1,) width, rank]."""
    width = min(stacked.shape[-2], out.shape[1])
    bgmv_expand_slice(inputs, stacked, out, indices, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: Any, stacked: Any, out: Any, indices: Any, offset: int, width: int, add_inputs: bool = True
) -> None:
    """Do the same on columns offset to offset + width of out."""
    columns = slice(offset, offset + width)
    if not add_inputs:
        out[:, columns] = 0
    for slot, rows in _rows_of_each(indices):
        update = inputs[rows].to(out.dtype) @ _weight(stacked, slot).to(out.dtype).T
        out[rows, columns] += update[:, :width]


def register() -> None:
    """Replace vLLM's functions; it calls this in each of its processes (entry point group vllm.general_plugins)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for operation in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        setattr(lora_ops, operation.__name__, operation)
        setattr(punica_cpu, operation.__name__, operation)
