"""The parts of a memory estimate: items with their sizes, and the range in which a measured peak is expected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from adapterhub.memory.model_shape import ModelShape

Device = Literal["cpu", "cuda"]

SPREAD = 0.25
"""Share by which a measured peak may differ from the sum: allocators, scratch space of kernels, other libraries."""
PROCESS_CPU = 650 << 20
"""Bytes of interpreter, torch and transformers before a model is loaded; measured, Python 3.11, torch 2.13."""
PROCESS_CUDA = 600 << 20
"""Bytes of a CUDA context with the kernels of bitsandbytes and cuBLAS."""
_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights per quantization constant, constants per second-level constant (arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Item:
    """One named part of a memory estimate."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a run or a server holds on each device, in host RAM and on disk, in bytes."""

    device: tuple[Item, ...]
    host: tuple[Item, ...]
    disk: tuple[Item, ...]
    spikes: tuple[Item, ...]
    """Peaks of moments other than a step or a decode; contained in the range."""
    textbook: tuple[Item, ...]
    """The common rules of thumb, for comparison."""
    uncertain_bytes: int = 0
    """Part of the device's memory that some machines do not hold: state that may move to host RAM when the device is
    full, products that only some CPUs compile."""

    @property
    def size_bytes(self) -> int:
        """Sum of the items on one device."""
        return total(self.device)

    @property
    def low(self) -> int:
        """Lower end of the range of one device's peak."""
        return int((self.size_bytes - self.uncertain_bytes) * (1 - SPREAD))

    @property
    def high(self) -> int:
        """Upper end of the range of one device's peak."""
        return int(self.size_bytes * (1 + SPREAD))


def total(items: Iterable[Item]) -> int:
    """Return the sum of the items' sizes."""
    return sum(item.size_bytes for item in items)


def constant_bytes(quantized: int, *, is_double: bool = True, block_size: int = _BLOCK) -> int:
    """Return the bytes of the constants of `quantized` 4-bit weights (arXiv 2305.14314, section 3).

    There is one constant per block: fp32, or with double quantization 8 bit and one fp32 constant for 256 of them.
    """
    constants = quantized // block_size
    return constants + 4 * (constants // _NESTED_BLOCK) if is_double else 4 * constants


def loading_peak(shape: ModelShape, base: Iterable[Item]) -> Item:
    """Return the peak while the base is loaded: the base, and one matrix in bf16 on its way."""
    return Item("loading the base", total(base) + 2 * shape.vocabulary * shape.hidden)


def process_items(device: Device) -> list[Item]:
    """Return what a process takes on the device before it holds a model."""
    return [Item("process", PROCESS_CPU)] if device == "cpu" else [Item("CUDA context", PROCESS_CUDA)]
