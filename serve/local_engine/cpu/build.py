"""Compile csrc/ for this processor, once per machine. Knows no tensors.

A library is stored in $ADAPTERHUB_HOME/kernels under a digest of sources, flags, compiler and processor, and one of its
own bytes: a file cut short, by a full disk or a power failure, is never loaded but compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path

from adapterhub.paths import home

_FLAGS = (
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    # No reordering of sums, no contraction: a row's bits must not depend on the other rows.
    "-ffp-contract=off",
)  # fmt: skip
NATIVE = ("-march=native", "-mcpu=native", "")
"""Flags for this processor's own instructions; some compilers for Arm know only the second."""
LEVELS = {
    "x86_64": {"AVX-512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3", "generic C": "-march=x86-64"},
    "aarch64": {"NEON": "-march=armv8-a"},
}
"""Architecture -> instruction set that csrc/ knows, as `vectors` in build.c names it -> compiler flag for it."""
_LOOP = "int sum(int n) {\n    int found = 0;\n#pragma omp parallel for\n    for (int i = 0; i < n; i++) found = n;\n" \
    "    return found;\n}\n"  # fmt: skip


class BuildFailed(Exception):
    """Raised where there is no library; the message gives the reason."""


def build(tunings: Sequence[str] = NATIVE, *, compiler: str | None = None) -> tuple[ctypes.CDLL, str]:
    """Return the kernels, compiled with the first of `tunings` that the compiler knows, and the compiler's path.

    Raises BuildFailed.
    """
    compiler = compiler or next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildFailed("no C compiler on PATH; with one, decoding is several times faster")
    sources = {
        path.name: path.read_bytes() for path in package_files("serve.local_engine.cpu").joinpath("csrc").iterdir()
    }
    folder, digest = home() / "kernels", _digest(sources, compiler, tunings)
    try:
        for kept in sorted(folder.glob(f"{digest}-*.so")):
            if isinstance(library := _load(kept), ctypes.CDLL):
                return library, compiler
            kept.unlink(missing_ok=True)
        library = _load(_compile(compiler, sources, tunings, folder, digest))
    except OSError as error:
        raise BuildFailed(f"{compiler} cannot write to {folder}: {error}") from error
    if isinstance(library, str):
        raise BuildFailed(f"what {compiler} made cannot be loaded: {library}")
    return library, compiler


def can_run(vectors: str) -> bool:
    """Return whether this machine executes code compiled for such vectors. For tests, on Linux."""
    needed = {
        "AVX-512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "AVX2": {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"},
    }
    return needed.get(vectors, set()) <= set(_processor().split())


def _load(path: Path) -> ctypes.CDLL | str:
    """Return the library, or why this file cannot be loaded."""
    try:
        # Checked first: loading a file that is cut short may end the process.
        if path.stem.rpartition("-")[2] != _short_digest(path.read_bytes()):
            return f"{path} is incomplete"
        return ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)


def _compile(compiler: str, sources: dict[str, bytes], tunings: Sequence[str], folder: Path, digest: str) -> Path:
    """Compile and store the library, atomically. Return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as text:
        scratch = Path(text)
        for name, source in sources.items():
            (scratch / name).write_bytes(source)
        units = sorted(name for name in sources if name.endswith(".c"))
        flags = (*_FLAGS, *_accepted(compiler, scratch, tunings), *_accepted(compiler, scratch, ("-fopenmp", "")))
        done = _run([compiler, *flags, *units, "-o", "kernels.so", "-lm"], scratch)
        if done.returncode:
            raise BuildFailed(f"{compiler} failed: {_reason(done)}")
        made = scratch / "kernels.so"
        return made.replace(folder / f"{digest}-{_short_digest(made.read_bytes())}.so")


def _accepted(compiler: str, scratch: Path, choices: Sequence[str]) -> list[str]:
    """Return the first of the choices that compiles a small library; nothing for '' or when none does."""
    (scratch / "trial.h").write_text(_LOOP)
    for choice in choices:
        command = [compiler, *filter(None, [choice]), "-shared", "-fPIC", "-x", "c", "trial.h", "-o", "trial.so"]
        if choice and not _run(command, scratch).returncode:
            return [choice]
    return []


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def _digest(sources: dict[str, bytes], compiler: str, tunings: Sequence[str]) -> str:
    """Return the digest of sources, compiler, flags and processor: a shared home may serve several processors."""
    parts = [name.encode() + b"\0" + source for name, source in sorted(sources.items())]
    parts += [" ".join((*_FLAGS, *tunings)).encode(), os.path.realpath(compiler).encode(), _processor().encode()]
    return _short_digest(b"\0".join(parts))


def _short_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _processor() -> str:
    """Return the processor's instruction sets as Linux lists them; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
