"""Reading a safetensors file once: its sha256, and whether every value is a number. Loads numpy, no torch."""

from __future__ import annotations

import hashlib
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


def sha256_and_nonfinite(path: Path, header: dict[str, TensorInfo]) -> tuple[str, list[str]]:
    """Return the file's sha256 and the names of the tensors that contain NaN or Inf.

    `header` is the file's own, checked (`read_header`), so tensors follow each other without a gap. Each chunk of
    1 MiB is hashed and checked while it is in the cache.
    """
    digest = hashlib.sha256()
    nonfinite = []
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
            left, is_finite = info.size_bytes, True
            while left and (chunk := read(left)):
                left -= len(chunk)
                is_finite = is_finite and _is_finite(chunk, info.dtype)
            if not is_finite:
                nonfinite.append(name)
    return digest.hexdigest(), nonfinite


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
