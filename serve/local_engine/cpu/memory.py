"""Memory of this machine that costs nothing until it is written, in pages of the size that suits its use."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import torch

from adapterhub.errors import UsageError

_LINE = 64
"""bytes of a line of the processor's caches"""


def zeros(size: Sequence[int], dtype: torch.dtype, *, huge_pages: bool = False) -> torch.Tensor:
    """A tensor of zeros, mapped by itself: a page counts as used from the first write to it, and goes back at the end.

    Huge pages (2 MiB, where Linux has them to give) are read faster from end to end; small ones are used one by one.
    Raises UsageError for more than the system maps.
    """
    nbytes = torch.Size(size).numel() * dtype.itemsize
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{nbytes:,} bytes of memory cannot be had ({error}): ask for less.") from error
    advice = getattr(mmap, "MADV_HUGEPAGE" if huge_pages else "MADV_NOHUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a Linux built without them
            block.madvise(advice)
    return torch.frombuffer(block, dtype=dtype).view(*size)


def trim_heap() -> None:
    """Return to the system what was freed between things still in use, as far as the C library can.

    Loading a base of 135 million parameters leaves some 300 MB of that with glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class HugePages:
    """Room on huge pages for tensors that a step reads one after the other: each lies behind the one kept before it."""

    def __init__(self, nbytes: int = 1 << 26) -> None:
        """`nbytes` are mapped at a time, and used as far as they are filled."""
        self._nbytes = nbytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor`, contiguous, that begins at a line of the cache."""
        room = self.room_for(tensor)
        if room > len(self._left):
            self._left = zeros([max(room, self._nbytes)], torch.uint8, huge_pages=True)
        piece, self._left = self._left[: tensor.nbytes], self._left[room:]
        return piece.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    @staticmethod
    def room_for(tensor: torch.Tensor) -> int:
        """Bytes that `keep` takes for it."""
        return -(-tensor.nbytes // _LINE) * _LINE
