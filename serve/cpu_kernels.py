"""Compiles cpu_kernels.c once per machine and calls it on torch tensors. Where there is no compiler, torch does all.

Kept in $ADAPTERHUB_HOME/kernels under a digest of source, flags and processor, so that a change is compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path

import torch

from adapterhub.base_model import Choice
from adapterhub.home import home

MAX_RANK = 1024
_FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp",
    # Sums may be reordered, which is what lets them use vectors; NaN and infinity keep their meaning.
    "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
)  # fmt: skip


class Update(ctypes.Structure):
    """The C struct of one low-rank update; see cpu_kernels.c."""

    _fields_ = (
        ("start", ctypes.c_int32),
        ("end", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("out", ctypes.c_int32),
        ("offset", ctypes.c_int32),
        ("chain", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("a", ctypes.c_void_p),
        ("bt", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class CpuKernels:
    """Every call releases the interpreter lock, so that the event loop runs while a step computes."""

    library: ctypes.CDLL

    def low_rank_updates(
        self, x: torch.Tensor, y: torch.Tensor, updates: ctypes.Array[Update], weights_dtype: torch.dtype
    ) -> None:
        """In place on y [rows, columns] from x [rows, in]; both bf16 or both fp32, unit stride in a row."""
        self.library.low_rank_updates(
            _at(x), _i64(x.stride(0)), _at(y), _i64(y.stride(0)), _is_bf16(x), x.shape[1],
            updates, len(updates), int(weights_dtype == torch.bfloat16),
        )  # fmt: skip

    def decode_attention(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        """query [heads, N, d] at `rows`, over the first lengths[i] of slots[i], into out [N, heads, d] at `rows`.

        keys and values are fp32 [kv_heads, num_slots, d]; rows, slots and lengths int64; 0 turns window or
        softcap off.
        """
        self.library.decode_attention(
            _at(query), _i64(query.stride(0)), _i64(query.stride(1)), _is_bf16(query), _at(rows), len(rows),
            query.shape[0], keys.shape[0], query.shape[2], _at(keys), _at(values), _i64(keys.shape[1]),
            _at(slots), _at(lengths), _i64(slots.shape[1]), ctypes.c_float(scale), window, ctypes.c_float(softcap),
            _at(out),
        )  # fmt: skip

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Llama's RMS norm over the last dimension of a contiguous x; x and weight bf16 or fp32 alike."""
        y = torch.empty_like(x)
        width = x.shape[-1]
        self.library.rms_norm(_at(x), _at(weight), _at(y), _is_bf16(x), x.numel() // width, width, ctypes.c_float(eps))
        return y


@cache
def load_kernels() -> tuple[CpuKernels | None, Choice]:
    """The kernels, compiled if they must be, or None; and what was chosen, with the reason."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None, Choice("cpu kernels", "torch", "no C compiler on PATH; with one, decoding is several times faster")
    source = package_files("serve").joinpath("cpu_kernels.c").read_bytes()
    target = home() / "kernels" / f"{_digest(source, compiler)}.so"
    if not target.exists():
        reason = _compile(compiler, source, target)
        if reason is not None:
            return None, Choice("cpu kernels", "torch", f"{compiler} failed: {reason}")
    return CpuKernels(ctypes.CDLL(str(target))), Choice("cpu kernels", "own", f"compiled by {compiler} for this CPU")


def _compile(compiler: str, source: bytes, target: Path) -> str | None:
    """None when `target` is there, else why not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as text:
        scratch = Path(text)
        (scratch / "cpu_kernels.c").write_bytes(source)
        command = [compiler, *_FLAGS, "cpu_kernels.c", "-o", "kernels.so", "-lm"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        (scratch / "kernels.so").replace(target)
    return None


def _digest(source: bytes, compiler: str) -> str:
    """-march=native makes the result this processor's: a home on a shared disk may serve several."""
    try:
        processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        processor = platform.processor()
    parts = (source, " ".join(_FLAGS).encode(), os.path.realpath(compiler).encode(), processor.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _is_bf16(tensor: torch.Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)
