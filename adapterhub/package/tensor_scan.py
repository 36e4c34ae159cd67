"""Reading a safetensors file once: its sha256, and what its values are. Loads numpy, no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapterhub.package.safetensors_header import TensorInfo

_CHUNK_BYTES = 1 << 20
_INFINITY = {
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F32": (np.int32, np.uint32, 0x7F800000),
    "F64": (np.int64, np.uint64, 0x7FF << 52),
}
"""Dtype -> (signed, unsigned integer, bits of infinity). As integers, Inf and NaN are the largest of either sign."""


@dataclass(frozen=True)
class Scan:
    """What one reading of a safetensors file found."""

    sha256: str
    nonfinite: list[str]
    """Names of the tensors that contain NaN or Inf."""
    zero: list[str]
    """Names of the tensors that are zero, or minus zero, everywhere."""


def scan(path: Path, header: dict[str, TensorInfo]) -> Scan:
    """Return the file's sha256 and the names of tensors with NaN or Inf, and of those that are zero.

    `header` is the file's own, checked (`read_header`), so tensors follow each other without a gap. Each chunk of
    1 MiB is hashed and checked while it is in the cache.
    """
    digest = hashlib.sha256()
    nonfinite, zero = [], []
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:

        def read(size: int) -> memoryview:
            chunk = buffer[: file.readinto(buffer[: min(size, _CHUNK_BYTES)])]
            digest.update(chunk)
            return chunk

        tensors = sorted(header.items(), key=lambda item: (item[1].start, item[1].end))
        left = tensors[0][1].start if tensors else path.stat().st_size
        while left and (chunk := read(left)):
            left -= len(chunk)
        for name, info in tensors:
            left, is_finite, is_zero = info.size_bytes, True, True
            while left and (chunk := read(left)):
                left -= len(chunk)
                is_finite = is_finite and _is_finite(chunk, info.dtype)
                is_zero = is_zero and _is_zero(chunk, info.dtype)
            if not is_finite:
                nonfinite.append(name)
            if is_zero:
                zero.append(name)
    return Scan(digest.hexdigest(), nonfinite, zero)


def _is_finite(chunk: memoryview, dtype: str) -> bool:
    """Return whether all values are finite. Dtypes that no LoRA is stored in (F8) are left to the reader that loads."""
    if dtype not in _INFINITY:
        return True
    signed, unsigned, infinity = _INFINITY[dtype]
    whole = chunk[: len(chunk) // np.dtype(signed).itemsize * np.dtype(signed).itemsize]
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    if not whole:
        return True
    return bool(
        np.frombuffer(whole, signed).max() < infinity and np.frombuffer(whole, unsigned).max() < (infinity | sign)
    )


def _is_zero(chunk: memoryview, dtype: str) -> bool:
    if dtype not in _INFINITY:
        return False
    values = np.frombuffer(chunk, _INFINITY[dtype][1])
    return not (values << 1).any()  # without the sign
