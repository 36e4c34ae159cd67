"""The structs that csrc/ reads, and the classes that fill them in.

C reads bare addresses. Each class checks every tensor it points to once, when it is made (tensor_address.py), and keeps
a reference to those tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapterhub.bases.nf4 import Nf4Weights
from adapterhub.tensor_address import TensorMismatch, address_of

if TYPE_CHECKING:
    from serve.adapters.weights import LowRank

MAX_RANK = 1024
MAX_HEAD_DIM = 256
LANES = 16
"""Widths of rows are multiples of this, whatever vectors a processor has."""
_TILE_ROWS = 4
"""Rows of a prompt that attention computes together."""


# The structs of csrc/kernels.h, field by field.


class Matrix(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32), ("in_features", c_int32), ("out_features", c_int32), ("block", c_int32),
        ("weights", c_void_p), ("absmax", c_void_p), ("book", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class Part(ctypes.Structure):
    _fields_ = (
        ("a", c_void_p), ("bt", c_void_p), ("magnitude", c_void_p), ("scaling", c_float), ("rank", c_int32),
        ("out_features", c_int32), ("offset", c_int32), ("a_is_bf16", c_int32), ("bt_is_bf16", c_int32),
    )  # fmt: skip


class Parts(ctypes.Structure):
    _fields_ = (("parts", c_void_p), ("count", c_int32))


class Segment(ctypes.Structure):
    _fields_ = (("groups", c_void_p), ("scale", c_float), ("start", c_int32), ("end", c_int32), ("chain", c_int32))


class Tile(ctypes.Structure):
    _fields_ = (("blocks", c_void_p), ("row", c_int32), ("rows", c_int32), ("start", c_int32))


class Cache(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("slots", c_int64), ("block_size", c_int32))


class Heads(ctypes.Structure):
    _fields_ = (
        ("heads", c_int32), ("kv_heads", c_int32), ("dim", c_int32), ("window", c_int32),
        ("scale", c_float), ("softcap", c_float),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix), ("output", Matrix), ("gate_up", Matrix), ("down", Matrix),
        ("input_norm", c_void_p), ("post_norm", c_void_p), ("query_norm", c_void_p), ("key_norm", c_void_p),
        ("keys", c_void_p), ("values", c_void_p),
        ("qkv_group", c_int32), ("output_group", c_int32), ("gate_up_group", c_int32), ("down_group", c_int32),
        ("window", c_int32),
    )  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = (
        ("heads", Heads), ("slots", c_int64), ("hidden", c_int32), ("intermediate", c_int32), ("block_size", c_int32),
        ("eps", c_float),
    )  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = (
        ("tiles", c_void_p), ("segments", c_void_p), ("cosine", c_void_p), ("sine", c_void_p),
        ("rows", c_int32), ("num_tiles", c_int32), ("num_segments", c_int32),
    )  # fmt: skip


STRUCTS = (Matrix, Part, Parts, Segment, Tile, Cache, Heads, Layer, Shape, Step)
"""All structs, in the order of `struct_size` in csrc/build.c."""


def row_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which C reads a tensor's rows: bf16 if it has that, else fp32."""
    return torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32


class WeightMatrix:
    """Weights [out, in] as the kernels read them: NF4, bf16 or fp32, by rows."""

    def __init__(self, weights: Nf4Weights | torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._kept = (weights, bias)
        out, width = self.out_features, self.in_features = weights.shape
        if width % LANES:
            raise TensorMismatch(f"rows of weights are {width} wide: expected a multiple of {LANES}.")
        kind, block, at = _nf4(weights) if isinstance(weights, Nf4Weights) else _dense(weights)
        self.struct = Matrix(
            kind, width, out, block, *at, None if bias is None else address_of(bias, "the bias", torch.float32, out)
        )


def _nf4(weights: Nf4Weights) -> tuple[int, int, list[int]]:
    """Return MATRIX_NF4 of csrc/kernels.h, the block size, and the addresses of codes, constants and code book."""
    (out, width), block = weights.shape, weights.block_size
    if block < 2 or block % 2 or width % block:
        raise TensorMismatch(f"rows of NF4 weights are {width} wide: expected whole blocks of {block}, an even number.")
    return 2, block, [
        address_of(weights.codes, "NF4 codes", torch.uint8, out * width // 2),
        address_of(weights.absmax, "NF4 constants", torch.float32, out * width // block),
        address_of(weights.book, "the NF4 code book", torch.float32, 16),
    ]  # fmt: skip


def _dense(weights: torch.Tensor) -> tuple[int, int, list[int | None]]:
    """Return MATRIX_FP32 or MATRIX_BF16 of csrc/kernels.h, block size 0, and the address of the weights."""
    dtype = row_dtype(weights)
    return int(dtype == torch.bfloat16), 0, [address_of(weights, "the weights", dtype, *weights.shape), None, None]


Widths = tuple[tuple[int, int], ...]
"""(in, out) of each group of layers computed together, in the model's order."""


class AdapterTable:
    """One adapter's updates of every group of a model's layers, as low_rank.c reads them."""

    def __init__(self, widths: Widths, updates: Sequence[Sequence[tuple[int, LowRank]]]) -> None:
        """Make the table; `updates` of each group are (first column of the layer's output, update)."""
        self._kept = updates
        self.widths = widths
        parts = [[_part(*update, *size) for update in of_group] for size, of_group in zip(widths, updates, strict=True)]
        self._parts = [(Part * len(found))(*found) for found in parts]
        self._table = (Parts * len(widths))(*(Parts(ctypes.addressof(found), len(found)) for found in self._parts))
        self.address = ctypes.addressof(self._table)


def _part(offset: int, update: LowRank, in_features: int, out_features: int) -> Part:
    a, bt, magnitude = update.a, update.bt, update.magnitude
    rank, width = bt.shape
    if not 1 <= rank <= MAX_RANK or not 0 <= offset <= out_features - width:
        raise TensorMismatch(
            f"an update has rank {rank} and width {width} at column {offset}: expected a rank of 1 to {MAX_RANK}, and "
            f"columns among the {out_features} of its layers."
        )
    a_dtype, bt_dtype = row_dtype(a), row_dtype(bt)
    return Part(
        address_of(a, "lora_A", a_dtype, rank, in_features),
        address_of(bt, "lora_B, transposed,", bt_dtype, rank, width),
        None if magnitude is None else address_of(magnitude, "the magnitude", torch.float32, width),
        update.scaling, rank, width, offset, a_dtype == torch.bfloat16, bt_dtype == torch.bfloat16,
    )  # fmt: skip


class SegmentTable:
    """Adapters of the rows of a batch: runs of (first row, end, adapters with their scales)."""

    def __init__(
        self, runs: Sequence[tuple[int, int, Sequence[tuple[AdapterTable, float]]]] = (), *, num_rows: int = 0
    ) -> None:
        self._kept = runs
        self.num_rows = num_rows
        self.widths: Widths = runs[0][2][0][0].widths if runs else ()
        structs: list[Segment] = []
        row = 0
        for start, end, mix in runs:
            if not row <= start <= end <= num_rows or any(table.widths is not self.widths for table, _ in mix):
                raise TensorMismatch(
                    f"rows {start} to {end} have adapters: expected some of rows {row} to {num_rows}, and adapters of "
                    "one model."
                )
            structs += [
                Segment(table.address, scale, start, end, 0 if number else len(mix))
                for number, (table, scale) in enumerate(mix)
            ]
            row = end
        self.array = (Segment * len(structs))(*structs)

    def __len__(self) -> int:
        return len(self.array)


class Tiles:
    """Blocks that the rows of a batch attend over: chunks of (first token's position, rows, block numbers)."""

    def __init__(self, chunks: Sequence[tuple[int, int, Sequence[int]]], *, block_size: int) -> None:
        numbers = [number for _, _, blocks in chunks for number in blocks]
        self.block_size = block_size
        self.num_slots = (max(numbers, default=-1) + 1) * block_size
        """Number of slots of keys and values that the cache must have."""
        self.num_rows = sum(rows for _, rows, _ in chunks)
        if min(numbers, default=0) < 0:
            raise TensorMismatch(f"block number {min(numbers)}: expected 0 or more.")
        self._blocks = torch.tensor(numbers, dtype=torch.int32)
        tiles: list[tuple[int, int, int, int]] = []
        at, row = address_of(self._blocks, "block numbers", torch.int32, len(numbers)), 0
        for start, rows, blocks in chunks:
            if start < 0 or rows < 0 or start + rows > len(blocks) * block_size:
                raise TensorMismatch(
                    f"{rows} rows from token {start} on over {len(blocks)} blocks of {block_size}: expected as many "
                    "blocks as hold them."
                )
            for first in range(0, rows, _TILE_ROWS):
                tiles.append((at, row + first, min(_TILE_ROWS, rows - first), start + first))
            row += rows
            at += len(blocks) * self._blocks.element_size()
        self.array = (Tile * len(tiles))(*(Tile(*fields) for fields in tiles))

    def check_cache(self, slots: int, block_size: int) -> None:
        """Raise TensorMismatch unless a cache with this number of slots and block size has all these blocks."""
        if self.num_slots > slots or self.block_size != block_size:
            raise TensorMismatch(
                f"rows attend over {self.num_slots} slots in blocks of {self.block_size}: expected at most the {slots} "
                f"there are, in blocks of {block_size}."
            )


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of a Llama-like model; each projection with the number of its group among the adapters' updates."""

    qkv: tuple[WeightMatrix, int]
    output: tuple[WeightMatrix, int]
    gate_up: tuple[WeightMatrix, int]
    down: tuple[WeightMatrix, int]
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    window: int
    """Attention window, in tokens; 0 for none."""


class DecoderLayers:
    """All layers of a Llama-like model, as decoder.c runs them."""

    def __init__(
        self, layers: Sequence[DecoderLayer], *, heads: Heads, intermediate: int, block_size: int, eps: float
    ) -> None:
        self._kept = layers
        self.hidden = layers[0].input_norm.shape[0]
        self.dim = heads.dim
        self.shape = Shape(heads, layers[0].keys.shape[1], self.hidden, intermediate, block_size, eps)
        check_heads(heads)
        self.array = (Layer * len(layers))(*(_layer(layer, self.shape) for layer in layers))
        queries, keys = heads.heads * heads.dim, heads.kv_heads * heads.dim
        self.room = self.hidden + max(2 * queries + 2 * keys, 3 * intermediate)
        """Scratch space that decoder.c needs for a row, in floats."""
        places = (place for one in layers for place in (one.qkv, one.output, one.gate_up, one.down))
        self._widths = [(group, (matrix.in_features, matrix.out_features)) for matrix, group in places]

    def check_updates(self, segments: SegmentTable, rows: int) -> None:
        """Raise TensorMismatch unless these are updates of these layers' groups, for this number of rows."""
        if segments.num_rows != rows:
            raise TensorMismatch(f"adapters are known for {segments.num_rows} rows: expected the batch's {rows}.")
        widths = segments.widths
        for group, expected in self._widths:
            if group >= len(widths) or widths[group] != expected:
                raise TensorMismatch(f"adapters update other layers: expected group {group} to be {expected}.")


def _layer(layer: DecoderLayer, shape: Shape) -> Layer:
    heads, hidden, inner = shape.heads, shape.hidden, shape.intermediate
    queries, keys = heads.heads * heads.dim, heads.kv_heads * heads.dim
    sizes = ((hidden, queries + 2 * keys), (queries, hidden), (hidden, 2 * inner), (inner, hidden))
    projections = (layer.qkv, layer.output, layer.gate_up, layer.down)
    for (matrix, _), size in zip(projections, sizes, strict=True):
        if (matrix.in_features, matrix.out_features) != size or layer.window < 0:
            raise TensorMismatch(
                f"a projection of a decoder layer is {matrix.in_features} -> {matrix.out_features}, its window "
                f"{layer.window}: expected {size[0]} -> {size[1]} and 0 or more."
            )
    cached = (heads.kv_heads, shape.slots, heads.dim)
    if (layer.query_norm is None) != (layer.key_norm is None):
        raise TensorMismatch("a decoder layer has a norm of its queries or of its keys: expected both or none.")

    def norm(weight: torch.Tensor | None, size: int) -> int | None:
        return None if weight is None else address_of(weight, "the weight of a norm", torch.float32, size)

    return Layer(
        *(matrix.struct for matrix, _ in projections),
        norm(layer.input_norm, hidden), norm(layer.post_norm, hidden),
        norm(layer.query_norm, heads.dim), norm(layer.key_norm, heads.dim),
        address_of(layer.keys, "cached keys", torch.float32, *cached),
        address_of(layer.values, "cached values", torch.float32, *cached),
        *(group for _, group in projections), layer.window,
    )  # fmt: skip


def check_heads(heads: Heads) -> None:
    """Raise TensorMismatch for heads that attention.c does not compute."""
    if heads.dim % LANES or not 0 < heads.dim <= MAX_HEAD_DIM or heads.kv_heads < 1 or heads.heads % heads.kv_heads:
        raise TensorMismatch(
            f"{heads.heads} heads of {heads.dim} numbers over {heads.kv_heads}: expected multiples of {LANES} up to "
            f"{MAX_HEAD_DIM}, and as many for each."
        )
