"""Reading the header of a safetensors file without trusting it and without loading a tensor.

Format: 8 bytes little-endian header length, JSON header, data; https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import InvalidTensors
from adapterhub.strict import parse_json

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header, in bytes: the bound of the safetensors library itself."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the tensor's data in the file, in bytes."""
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return tensor name -> dtype, shape and place in the file, checked against the file's real size.

    Raises InvalidTensors for a truncated file, a header out of bounds, unknown dtypes, sizes that do not
    match shapes, and overlapping, out-of-range or gapped data. Allocates no more than the file's size.
    """

    def refuse(why: str) -> InvalidTensors:
        return InvalidTensors(f"{path.name} is damaged: {why}. Fetch or save it again ({path}).")

    file_size = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise refuse(f"{file_size} bytes are too few for a safetensors file")
        length = int.from_bytes(length_bytes, "little")
        if length > min(MAX_HEADER_BYTES, file_size - 8):
            raise refuse(f"its header claims {length:,} bytes, the file has {file_size:,}")
        try:
            header: Any = parse_json(file.read(length))
        except ValueError as error:
            raise refuse(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    header.pop("__metadata__", None)

    data_start = 8 + length
    tensors = {}
    for name, raw in header.items():
        try:
            dtype, shape, (start, end) = raw["dtype"], raw["shape"], raw["data_offsets"]
            whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (TypeError, KeyError, ValueError) as error:
            raise refuse(f"tensor {name!r} has an invalid entry ({error!r})") from error
        if not whole or not isinstance(dtype, str) or dtype not in _BITS:
            told = f"dtype {dtype!r}, shape {shape!r}, offsets {start!r}-{end!r}"
            raise refuse(f"tensor {name!r} has {told[:200]}")
        if end - start != math.prod(shape) * _BITS[dtype] // 8:
            raise refuse(f"tensor {name!r} has {end - start:,} bytes, shape {shape} of {dtype} needs another size")
        tensors[name] = TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)

    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise refuse(f"tensor {name!r} starts at byte {info.start:,}, expected {position:,}")
        position = info.end
    if position != file_size:
        raise refuse(f"its tensors end at byte {position:,}, the file at {file_size:,}")
    return tensors
