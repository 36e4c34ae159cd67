"""Measure the parts of a decode step in our kernels, for this processor's vectors and compiled for AVX2.

    .venv/bin/python benchmarks/step_parts.py [--rounds 9]

The real SmolLM2-135M, all 30 layers' NF4 products, the bf16 head, and the low-rank updates of one adapter a row and of
one for all, at rank 16 in fp32; one thread, the best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import decode
import torch

from serve.local_engine.cpu import build as kernel_build
from serve.local_engine.cpu.kernels import CpuKernels
from serve.local_engine.cpu.structs import SegmentTable
from serve.local_engine.lora_layers import AdapterBank, LinearGroup

NUM_ADAPTERS = 32


def compiled(tunings: Sequence[str]) -> CpuKernels:
    """Compile the kernels with the first of these flags that the compiler knows."""
    return CpuKernels(kernel_build.build(tunings)[0])


def milliseconds(run: Callable[[], None], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found) * 1e3


def parts(kernels: CpuKernels, bank: AdapterBank, rows: int) -> dict[str, Callable[[], None]]:
    groups = [group for group in bank.groups if group.matrix is not None]
    layers, head = groups[:-1], groups[-1]
    x = {width: torch.randn(rows, width) for width in {g.layers[0].in_features for g in groups}}
    y = {sum(g.widths): torch.zeros(rows, sum(g.widths)) for g in layers}

    def products(of: list[LinearGroup]) -> None:
        for group in of:
            assert group.matrix is not None
            kernels.matmul(group.matrix, x[group.layers[0].in_features])

    def updates(num_adapters: int) -> None:
        share = rows // num_adapters
        runs = [(n * share, (n + 1) * share, [(bank._tables[f"{n:04}"], 1.0)]) for n in range(num_adapters)]
        segments = SegmentTable(runs, num_rows=rows)
        for group in layers:
            kernels.low_rank_updates(segments, group.index, x[group.layers[0].in_features], y[sum(group.widths)])

    return {
        "NF4": lambda: products(layers),
        "head": lambda: products([head]),
        "an adapter a row": lambda: updates(min(rows, NUM_ADAPTERS)),
        "one adapter": lambda: updates(1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    bank = decode.Ours(decode.stored_base(), NUM_ADAPTERS).runner.adapters
    variants = {"this processor": compiled(kernel_build.NATIVE), "AVX2": compiled(["-march=x86-64-v3"])}
    names = list(parts(variants["this processor"], bank, 1))
    print("| rows | kernels | " + " | ".join(names) + " |\n" + "|---" * (2 + len(names)) + "|")
    for rows in (1, 4, 8, 16, 32, 256):
        for title, kernels in variants.items():
            found = [milliseconds(run, rounds) for run in parts(kernels, bank, rows).values()]
            print(f"| {rows} | {title} | " + " | ".join(f"{ms:.1f}" for ms in found) + " |", flush=True)


if __name__ == "__main__":
    main()
