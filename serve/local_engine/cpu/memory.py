"""Tensors in memory that is mapped lazily, with small or huge pages; and the release of freed heap pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import torch

from adapterhub.errors import UsageError
from adapterhub.units import format_bytes

_LINE = 64
"""Size of a cache line, in bytes."""


def zeros(size: Sequence[int], dtype: torch.dtype, *, huge_pages: bool = False) -> torch.Tensor:
    """Map a tensor of zeros: a page takes memory from the first write to it until the tensor is freed.

    Huge pages (2 MiB, where Linux provides them) are read faster from end to end; small ones take memory one by one.
    Raises UsageError for more than the system maps.
    """
    nbytes = torch.Size(size).numel() * dtype.itemsize
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{format_bytes(nbytes)} of memory cannot be allocated ({error}): ask for less.") from error
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge_pages else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a Linux kernel without huge pages
            block.madvise(advice)
    return torch.frombuffer(block, dtype=dtype).view(*size)


def trim_heap() -> None:
    """Return freed heap pages to the operating system (glibc malloc_trim).

    Loading a base of 135 million parameters leaves some 300 MB of them with glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class HugePages:
    """Storage on huge pages for tensors that a step reads one after another; they are adjacent in memory."""

    def __init__(self, nbytes: int = 1 << 26) -> None:
        """Map `nbytes` at a time; pages take memory as they are filled."""
        self._nbytes = nbytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of `tensor` that begins at a cache line."""
        room = self.room_for(tensor)
        if room > len(self._left):
            self._left = zeros([max(room, self._nbytes)], torch.uint8, huge_pages=True)
        storage, self._left = self._left[: tensor.nbytes], self._left[room:]
        return storage.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    @staticmethod
    def room_for(tensor: torch.Tensor) -> int:
        """Return the number of bytes that `keep` needs for `tensor`."""
        return -(-tensor.nbytes // _LINE) * _LINE
