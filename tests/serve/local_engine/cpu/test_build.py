"""Compiling the kernels with compilers that know less, fail, or are ended; and libraries that are not whole."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapterhub.choice import Choice
from serve.local_engine.cpu import build as kernel_build
from serve.local_engine.cpu.kernels import CpuKernels, load_kernels
from serve.local_engine.cpu.structs import WeightMatrix

REAL = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(REAL is None, reason="there is no C compiler to stand before")

_QUICK = " ".join(list(kernel_build.LEVELS.get(platform.machine(), {}).values())[-1:])
"""the fewest instructions, which compile fastest"""

Compiler = Callable[[str], Path]
"""script that runs before the real compiler -> where the arguments of each of its runs are written"""


@pytest.fixture
def compiler(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Put a script first on PATH that runs the real compiler, quickly."""

    def install(script: str) -> Path:
        log = tmp_path / "arguments"
        path = tmp_path / "bin" / "cc"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{script}\nexec {REAL} "$@" -O0 {_QUICK}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return log

    return install


def _refusing(*flags: str) -> str:
    return "\n".join(
        f'case " $* " in *" {flag} "*) echo "error: unsupported option {flag}" >&2; exit 1;; esac' for flag in flags
    )


def _load() -> tuple[CpuKernels | None, Choice]:
    return load_kernels.__wrapped__()  # type: ignore[no-any-return]


def _assert_right(kernels: CpuKernels | None) -> None:
    assert kernels is not None
    weights, x = torch.randn(5, 32), torch.randn(3, 32)
    torch.testing.assert_close(kernels.matmul(WeightMatrix(weights), x), x @ weights.T)


def test_a_compiler_without_openmp_makes_kernels_of_one_thread(compiler: Compiler) -> None:
    """As Apple's clang."""
    compiler(_refusing("-fopenmp"))
    kernels, choice = _load()
    _assert_right(kernels)
    assert choice.value == "own"
    assert "on one thread, because it has no OpenMP" in choice.reason


@pytest.mark.parametrize(
    ("refused", "used"),
    [((), "-march=native"), (("-march=native",), "-mcpu=native"), (("-march=native", "-mcpu=native"), None)],
    ids=["march", "mcpu", "neither"],
)
def test_this_processors_instructions_are_asked_for_in_words_the_compiler_knows(
    compiler: Compiler, refused: tuple[str, ...], used: str | None
) -> None:
    log = compiler(_refusing(*refused))
    _assert_right(_load()[0])
    last = log.read_text().splitlines()[-1].split()
    assert "matmul.c" in last
    assert [word for word in last if word.endswith("=native")] == ([used] if used else [])
    assert "-fopenmp" in last


def test_a_whole_library_is_compiled_once_and_one_that_was_cut_short_anew(compiler: Compiler, home: Path) -> None:
    log = compiler("")

    def times_compiled() -> int:
        return sum("matmul.c" in line for line in log.read_text().splitlines())

    first, again = _load(), _load()
    _assert_right(again[0])
    assert first[1] == again[1]
    assert times_compiled() == 1
    (library,) = (home / "kernels").iterdir()
    whole = library.read_bytes()
    for cut in (0, 100, len(whole) - 1, len(whole) // 2):
        library.unlink()  # what is loaded keeps its own pages
        library.write_bytes(whole[:cut])
        assert "is incomplete" in str(kernel_build._load(library))
    _assert_right(_load()[0])
    assert times_compiled() == 2
    assert [path.suffix for path in (home / "kernels").iterdir()] == [".so"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('case "$*" in *matmul.c*) kill -9 $$;; esac', "it was ended by SIGKILL"),
        ('case "$*" in *matmul.c*) echo nonsense > kernels.so; exit 0;; esac', "cannot be loaded"),
        ("echo 'out of licenses' >&2; exit 1", "failed: out of licenses"),
    ],
    ids=["killed", "makes nonsense", "fails"],
)
def test_a_compiler_of_which_nothing_comes_leaves_the_work_to_torch(
    compiler: Compiler, home: Path, script: str, reason: str
) -> None:
    compiler(script)
    kernels, choice = _load()
    assert kernels is None
    assert choice.value == "torch"
    assert reason in choice.reason
    assert all(path.suffix == ".so" for path in (home / "kernels").iterdir())


def test_a_home_that_cannot_be_written_leaves_the_work_to_torch(compiler: Compiler, home: Path) -> None:
    compiler("")
    home.write_text("a file")
    kernels, choice = _load()
    assert kernels is None
    assert "cannot write to" in choice.reason


def test_two_that_compile_at_once_both_have_kernels(compiler: Compiler, home: Path) -> None:
    compiler("")
    with ThreadPoolExecutor(2) as pool:
        for library, _ in pool.map(lambda _: kernel_build.build(), range(2)):
            _assert_right(CpuKernels(library))
    assert all(path.suffix == ".so" for path in (home / "kernels").iterdir())
