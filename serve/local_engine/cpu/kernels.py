"""Call the C kernels of csrc/ on torch tensors; each tensor is checked before its address is passed.

Where they cannot be compiled, torch computes everything.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch

from adapterhub.choice import Choice
from adapterhub.tensor_address import TensorMismatch, address_of, address_of_rows
from serve.local_engine.cpu import structs
from serve.local_engine.cpu.build import BuildFailed, build
from serve.local_engine.cpu.structs import LANES, DecoderLayers, SegmentTable, Tiles, WeightMatrix, row_dtype
from serve.local_engine.cpu.structs import MAX_RANK as MAX_RANK


class CpuKernels:
    """The compiled kernels. Every call releases the interpreter lock, so that the event loop runs meanwhile."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, types in _ARGUMENTS.items():
            getattr(library, name).argtypes = types
        library.vectors.restype = ctypes.c_char_p
        library.struct_size.restype = c_int64
        self.vectors = str(library.vectors(), "ascii")
        """Instruction set that the kernels were compiled for."""
        self.has_threads = bool(library.has_threads())
        here = [ctypes.sizeof(struct) for struct in structs.STRUCTS]
        there = [library.struct_size(number) for number in range(len(structs.STRUCTS))]
        if here != there or library.struct_size(len(structs.STRUCTS)):
            raise TensorMismatch(f"the structs are of {here} bytes here and {there} in C: expected the same.")

    def matmul(self, matrix: WeightMatrix, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in] fp32, contiguous -> [..., out] fp32."""
        width, out = matrix.in_features, matrix.out_features
        x_at = address_of(x, "what weights are multiplied by", torch.float32, *x.shape[:-1], width)
        y, y_at = _result(*x.shape[:-1], out)
        self._library.matmul(matrix.struct, x_at, width, y_at, out, x.numel() // width)
        return y

    def low_rank_updates(
        self, segments: SegmentTable, group: int, x: torch.Tensor, y: torch.Tensor, *, bias: torch.Tensor | None = None
    ) -> None:
        """Update y [rows, out] in place from x [rows, in]; both bf16 or both fp32. `bias` is what y has beside W x."""
        if not segments:
            return
        width, out = segments.widths[group]
        if width % LANES:
            raise TensorMismatch(f"rows to update from are {width} wide: expected a multiple of {LANES}.")
        dtype = row_dtype(x)
        x_at = address_of_rows(x, "rows to update from", dtype, segments.num_rows, width)
        y_at = address_of_rows(y, "rows to update", dtype, segments.num_rows, out)
        bias_at = None if bias is None else address_of(bias, "the bias", torch.float32, out)
        _check_memory(
            self._library.low_rank_updates(
                segments.array, len(segments), group, x_at, x.stride(0), y_at, y.stride(0), dtype == torch.bfloat16,
                width, out, bias_at,
            )
        )  # fmt: skip

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiles: Tiles,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Attend with query [heads, N, d] over keys and values [kv_heads, num_slots, d] -> [N, heads, d], all fp32.

        0 turns window or softcap off.
        """
        kv_heads, slots, dim = keys.shape
        heads, rows = query.shape[0], tiles.num_rows
        shape = structs.Heads(heads, kv_heads, dim, window, scale, softcap)
        structs.check_heads(shape)
        tiles.check_cache(slots, tiles.block_size)
        cache = structs.Cache(
            address_of(keys, "cached keys", torch.float32, kv_heads, slots, dim),
            address_of(values, "cached values", torch.float32, kv_heads, slots, dim), slots, tiles.block_size,
        )  # fmt: skip
        query_at = address_of_rows(query, "queries", torch.float32, heads, rows, dim)
        out, out_at = _result(rows, heads, dim)
        self._library.attention(
            shape, cache, tiles.array, len(tiles.array), query_at, query.stride(0), query.stride(1), out_at
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Apply Llama's RMS norm to the last dimension of a contiguous x; x and weight both bf16 or both fp32."""
        (width,) = weight.shape
        dtype = row_dtype(x)
        x_at = address_of(x, "what is normed", dtype, *x.shape[:-1], width)
        weight_at = address_of(weight, "the weight of a norm", dtype, width)
        y, y_at = _result(*x.shape, dtype=dtype)
        self._library.rms_norm(x_at, weight_at, y_at, dtype == torch.bfloat16, x.numel() // width, width, eps)
        return y

    def run_layers(
        self,
        layers: DecoderLayers,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        tiles: Tiles,
        segments: SegmentTable,
    ) -> None:
        """Run all decoder layers in place on hidden [rows, width]; `rotary`: cosine and sine [rows, d]."""
        rows, shape = tiles.num_rows, layers.shape
        tiles.check_cache(shape.slots, shape.block_size)
        if segments:
            layers.check_updates(segments, rows)
        hidden_at = address_of(hidden, "hidden states", torch.float32, rows, shape.hidden)
        cosine_at, sine_at = (address_of(one, "rotary embeddings", torch.float32, rows, layers.dim) for one in rotary)
        step = structs.Step(
            ctypes.addressof(tiles.array), ctypes.addressof(segments.array), cosine_at, sine_at, rows,
            len(tiles.array), len(segments),
        )  # fmt: skip
        _room, room_at = _result(rows, layers.room)
        _check_memory(self._library.run_layers(shape, layers.array, len(layers.array), step, hidden_at, room_at))


_INT, _LONG, _AT = c_int32, c_int64, c_void_p
_ARGUMENTS = {
    "matmul": (POINTER(structs.Matrix), _AT, _LONG, _AT, _LONG, _INT),
    "low_rank_updates": (POINTER(structs.Segment), _INT, _INT, _AT, _LONG, _AT, _LONG, _INT, _INT, _INT, _AT),
    "attention": (
        POINTER(structs.Heads), POINTER(structs.Cache), POINTER(structs.Tile), _INT, _AT, _LONG, _LONG, _AT,
    ),
    "rms_norm": (_AT, _AT, _AT, _INT, _INT, _INT, c_float),
    "run_layers": (POINTER(structs.Shape), POINTER(structs.Layer), _INT, POINTER(structs.Step), _AT, _AT),
}  # fmt: skip


@cache
def load_kernels() -> tuple[CpuKernels | None, Choice]:
    """Return the kernels, compiled if needed, or None; and the choice with its reason."""
    try:
        library, compiler = build()
    except BuildFailed as error:
        return None, Choice("cpu kernels", "torch", str(error))
    kernels = CpuKernels(library)
    threads = "" if kernels.has_threads else "; on one thread, because it has no OpenMP"
    return kernels, Choice("cpu kernels", "own", f"compiled by {compiler} for this CPU: {kernels.vectors}{threads}")


def _result(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, int]:
    """Allocate a tensor for C to write. Return it and its address."""
    found = torch.empty(shape, dtype=dtype, device="cpu")
    return found, address_of(found, "a result", dtype, *shape)


def _check_memory(status: int) -> None:
    if status:
        raise MemoryError("no memory for the rows of a step: serve with fewer sequences at a time or less KV cache.")
