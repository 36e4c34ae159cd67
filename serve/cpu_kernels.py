"""Compiles csrc/ once per machine and calls it on torch tensors. Where there is no compiler, torch does all.

Kept in $ADAPTERHUB_HOME/kernels under a digest of sources, flags and processor, so that a change is compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path

import torch

from adapterhub.base_model import Choice, Nf4Weights
from adapterhub.home import home

MAX_RANK = 1024
MAX_HEAD_DIM = 256
LANES = 16
"""what the widths of rows are multiples of, whichever vectors a processor has"""
_TILE_ROWS = 4
"""rows of a prompt that attention takes together"""
_FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp",
    "-fno-math-errno", "-fno-trapping-math",
    # Neither reordering of sums nor contraction: a row's bits are to be the same in any company.
    "-ffp-contract=off",
)  # fmt: skip


class Matrix(ctypes.Structure):
    """The structs of csrc/kernels.h and decoder.c, field by field."""

    _fields_ = (
        ("kind", c_int32), ("in_features", c_int32), ("out_features", c_int32), ("block", c_int32),
        ("weights", c_void_p), ("absmax", c_void_p), ("book", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class Part(ctypes.Structure):
    _fields_ = (
        ("a", c_void_p), ("bt", c_void_p), ("magnitude", c_void_p), ("scaling", c_float),
        ("rank", c_int32), ("out_features", c_int32), ("offset", c_int32), ("is_bf16", c_int32),
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


class WeightMatrix:
    """Weights [out, in] as the kernels read them: NF4, or bf16 or fp32 by rows."""

    def __init__(self, weights: Nf4Weights | torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._kept = (weights, bias)  # the struct holds bare addresses
        self.bias = bias
        self.out_features, self.in_features = weights.shape
        if isinstance(weights, Nf4Weights):
            block, addresses = weights.block_size, [weights.codes, weights.absmax, weights.book]
        else:
            block, addresses = 0, [weights]
        at = [_at(tensor) for tensor in addresses] + [None] * (3 - len(addresses))
        self.struct = Matrix(
            _kind(weights), self.in_features, self.out_features, block, *at, None if bias is None else _at(bias)
        )


def _kind(weights: Nf4Weights | torch.Tensor) -> int:
    """MATRIX_FP32, MATRIX_BF16 or MATRIX_NF4 of csrc/kernels.h."""
    if isinstance(weights, Nf4Weights):
        return 2
    return int(weights.dtype == torch.bfloat16)


class Tiles:
    """Which rows of a batch attend over which blocks: pieces of (first token's position, rows, block numbers)."""

    def __init__(self, pieces: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        numbers = [number for _, _, blocks in pieces for number in blocks]
        self._blocks = torch.tensor(numbers, dtype=torch.int32)
        tiles: list[tuple[int, int, int, int]] = []
        at, row = self._blocks.data_ptr(), 0
        for start, rows, blocks in pieces:
            for first in range(0, rows, _TILE_ROWS):
                tiles.append((at, row + first, min(_TILE_ROWS, rows - first), start + first))
            row += rows
            at += len(blocks) * self._blocks.element_size()
        self.array = (Tile * len(tiles))(*(Tile(*fields) for fields in tiles))


class CpuKernels:
    """Every call releases the interpreter lock, so that the event loop runs while a step computes."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def matmul(self, matrix: WeightMatrix, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] fp32, contiguous -> [..., out] fp32."""
        y = torch.empty(*x.shape[:-1], matrix.out_features)
        rows = x.numel() // matrix.in_features
        self.library.matmul(
            ctypes.byref(matrix.struct), _at(x), c_int64(matrix.in_features), _at(y), c_int64(matrix.out_features), rows
        )
        return y

    def low_rank_updates(
        self,
        segments: ctypes.Array[Segment],
        group: int,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
    ) -> None:
        """In place on y [rows, out] from x [rows, in]; both bf16 or both fp32. `bias` is what y holds beside W x."""
        self.library.low_rank_updates(
            segments, len(segments), group, _at(x), c_int64(x.stride(0)), _at(y), c_int64(y.stride(0)),
            int(x.dtype == torch.bfloat16), x.shape[1], y.shape[1], None if bias is None else _at(bias),
        )  # fmt: skip

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiles: Tiles,
        *,
        block_size: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """query [heads, N, d] fp32 over keys and values fp32 [kv_heads, num_slots, d] -> [N, heads, d].

        0 turns window or softcap off.
        """
        heads, rows, dim = query.shape
        out = torch.empty(rows, heads, dim)
        shape = Heads(heads, keys.shape[0], dim, window, scale, softcap)
        where = Cache(_at(keys), _at(values), keys.shape[1], block_size)
        self.library.attention(
            ctypes.byref(shape), ctypes.byref(where), tiles.array, len(tiles.array), _at(query),
            c_int64(query.stride(0)), c_int64(query.stride(1)), _at(out),
        )  # fmt: skip
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Llama's RMS norm over the last dimension of a contiguous x; x and weight bf16 or fp32 alike."""
        y = torch.empty_like(x)
        width = x.shape[-1]
        is_bf16 = int(x.dtype == torch.bfloat16)
        self.library.rms_norm(_at(x), _at(weight), _at(y), is_bf16, x.numel() // width, width, c_float(eps))
        return y

    def run_layers(
        self, shape: Shape, layers: ctypes.Array[Layer], step: Step, hidden: torch.Tensor, room: torch.Tensor
    ) -> None:
        """All decoder layers in place on hidden [rows, hidden]; see csrc/decoder.c for `room`."""
        self.library.run_layers(ctypes.byref(shape), layers, len(layers), ctypes.byref(step), _at(hidden), _at(room))


@cache
def load_kernels() -> tuple[CpuKernels | None, Choice]:
    """The kernels, compiled if they must be, or None; and what was chosen, with the reason."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, Choice("cpu kernels", "torch", "no C compiler on PATH; with one, decoding is several times faster")
    sources = {path.name: path.read_bytes() for path in package_files("serve").joinpath("csrc").iterdir()}
    target = home() / "kernels" / f"{_digest(sources, compiler)}.so"
    if not target.exists():
        reason = _compile(compiler, sources, target)
        if reason is not None:
            return None, Choice("cpu kernels", "torch", f"{compiler} failed: {reason}")
    return CpuKernels(target), Choice("cpu kernels", "own", f"compiled by {compiler} for this CPU")


def _compile(compiler: str, sources: dict[str, bytes], target: Path) -> str | None:
    """None when `target` is there, else why not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as text:
        scratch = Path(text)
        for name, source in sources.items():
            (scratch / name).write_bytes(source)
        units = sorted(name for name in sources if name.endswith(".c"))
        command = [compiler, *_FLAGS, *units, "-o", "kernels.so", "-lm"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        (scratch / "kernels.so").replace(target)
    return None


def _digest(sources: dict[str, bytes], compiler: str) -> str:
    """-march=native makes the result this processor's: a home on a shared disk may serve several."""
    try:
        processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        processor = platform.processor()
    parts = [name.encode() + b"\0" + source for name, source in sorted(sources.items())]
    parts += [" ".join(_FLAGS).encode(), os.path.realpath(compiler).encode(), processor.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _at(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
