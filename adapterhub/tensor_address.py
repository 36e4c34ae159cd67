"""Addresses of tensors for C code, checked against the dtype, shape and strides that it expects."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class TensorMismatch(ValueError):
    """A tensor is not what the C code expects. Nothing was read."""


def address_of(tensor: torch.Tensor, name: str, dtype: torch.dtype, *shape: int) -> int:
    """Return the address of a contiguous CPU tensor of this dtype and shape.

    The caller keeps the tensor as long as the address. Raises TensorMismatch.
    """
    if tensor.is_contiguous() and _is(tensor, dtype, shape):
        return tensor.data_ptr()
    raise _mismatch(tensor, name, dtype, shape, "contiguous")


def address_of_rows(tensor: torch.Tensor, name: str, dtype: torch.dtype, *shape: int) -> int:
    """Return the address of a CPU tensor whose last dimension is contiguous; C gets the other strides.

    Rows must not overlap, because C may write to them. Raises TensorMismatch.
    """
    if _is(tensor, dtype, shape) and _rows_are_apart(tensor):
        return tensor.data_ptr()
    raise _mismatch(tensor, name, dtype, shape, "its rows contiguous and apart")


def _is(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return (
        tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.device.type == "cpu"
        # A storage that was resized to nothing has no address; an address may be unaligned for its dtype.
        and (tensor.data_ptr() > 0 or not tensor.numel())
        and not tensor.data_ptr() % dtype.itemsize
    )


def _rows_are_apart(tensor: torch.Tensor) -> bool:
    strides = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    extent = 1
    for stride, size in strides:
        if stride < extent:
            return False
        extent = stride * size
    return tensor.shape[-1] == 1 or tensor.stride(-1) == 1


def _mismatch(
    tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> TensorMismatch:
    return TensorMismatch(
        f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}: "
        f"expected {dtype} {list(shape)} on cpu, {layout}."
    )
