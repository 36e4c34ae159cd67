"""Measure peak resident memory of 8 requests on 8 adapters: our engine against transformers and PEFT, one process each.

.venv/bin/python benchmarks/memory.py
"""

from __future__ import annotations

import resource
import subprocess
import sys

NUM_ADAPTERS, TOKENS = 8, 8


def ours() -> None:
    import decode
    import peers

    peers.Engine(decode.stored_base(), NUM_ADAPTERS).answer(NUM_ADAPTERS, TOKENS, num_adapters=NUM_ADAPTERS)


def peft() -> None:
    import decode

    decode.Peft(decode.stored_base(), NUM_ADAPTERS).decode(NUM_ADAPTERS, NUM_ADAPTERS, TOKENS)


def main() -> None:
    if len(sys.argv) == 2:
        {"ours": ours, "peft": peft}[sys.argv[1]]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    peaks = {}
    for name in ("ours", "peft"):
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout.split()[-1]) / 1024
    print("| | |\n|---|---|")
    print(f"| peak memory, ours (keys and values as used, of up to 512 MiB) | {peaks['ours']:.0f} MiB |")
    print(f"| peak memory, transformers + PEFT | {peaks['peft']:.0f} MiB |")
    print(f"| ours / theirs | {peaks['ours'] / peaks['peft']:.2f} |")


if __name__ == "__main__":
    main()
