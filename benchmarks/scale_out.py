"""Compare one training process with two over gloo, with a replicated or divided (FSDP) base: losses, bytes, peaks.

    .venv/bin/python benchmarks/scale_out.py [--layers 20] [--hidden 1024] [--steps 4]

The base is a random Llama of about 300 million parameters, created by the script, in NF4. The runs are those of
`adapterhub train ... --launch 2 [--shard]` on the shipped captain data. Losses and bytes are compared, and the
adapter of the divided run is loaded by PEFT and by our engine, whose answers are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from adapterhub.files import sha256_of
from adapterhub.package.lora_config import WEIGHTS_NAME as WEIGHTS

MAIN = "from adapterhub.cli.main import main; main()"
WAYS = {"one": (), "two, whole": ("--launch", "2"), "two, divided": ("--launch", "2", "--shard")}
RECIPE = """name = "scaled"
base = "{base}"
[data]
source = "shipped"
name = "captain"
held_out = 4
max_length = 128
[lora]
rank = 8
[train]
steps = {steps}
batch_size = 4
learning_rate = 1e-3
warmup_steps = 1
"""


def make_base(folder: Path, *, layers: int, hidden: int) -> int:
    """Create a random Llama with SmolLM2's tokenizer; return its number of parameters."""
    import decode
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=2816 * hidden // 1024, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = decode.stored_base().path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    return sum(parameter.numel() for parameter in model.parameters())


def peaks_of(process: subprocess.Popen[str]) -> list[int]:
    """Watch the training processes to their end; return the peak bytes of each, largest first."""
    import psutil

    peaks: dict[int, int] = {}
    while process.poll() is None:
        try:
            below = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in below:
                if "torch.distributed.run" not in one.cmdline():
                    peaks[one.pid] = max(peaks.get(one.pid, 0), one.memory_info().rss)
        except psutil.Error:
            pass
        time.sleep(0.05)
    return sorted(peaks.values(), reverse=True)


def train(place: Path, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    output = place / re.sub(r"\W+", "-", name)
    with (place / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", MAIN, "train", "mine.toml", "--output", output.name, *WAYS[name]],
            cwd=place, stderr=said, stdout=subprocess.DEVNULL, text=True,
            # One thread in each process, so that a process alone has no other arithmetic than two have.
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
        )  # fmt: skip
        peaks = peaks_of(process)
        said.seek(0)
        told = said.read()
    if process.returncode:
        raise SystemExit(told)
    held = re.search(r"of the base's ([\d.]+) MB each holds ([\d.]+) MB", told)
    events = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return {
        "folder": output,
        "losses": [event["loss"] for event in events if event["event"] == "step"],
        "held": tuple(map(float, held.groups())) if held else None,
        "peaks": peaks[: 1 if name == "one" else 2],
        "seconds": time.perf_counter() - started,
    }


def answers(base: Path, folder: Path) -> str:
    """Pack the adapter, which records PEFT's answers, and replay them on our engine."""
    import asyncio

    from adapterhub.adapter import BaseName
    from adapterhub.bases.loading import load_base
    from adapterhub.bases.store import find_base
    from adapterhub.packer import pack
    from serve.local_engine.engine import LocalEngine

    stored = find_base(BaseName.parse(str(base)))
    adapter = pack(folder, base=stored)

    async def serve() -> None:
        engine = LocalEngine(load_base(stored, purpose="serve"))
        try:
            await engine.load(adapter)
        finally:
            await engine.close()

    asyncio.run(serve())
    return f"{len(adapter.probe.answers) if adapter.probe else 0} answers of PEFT's, replayed by ours"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        count = make_base(place / "base", layers=chosen.layers, hidden=chosen.hidden)
        (place / "mine.toml").write_text(RECIPE.format(base=place / "base", steps=chosen.steps))
        print(f"a random Llama of {count / 1e6:.0f} M parameters, NF4, {chosen.steps} steps of 4 samples\n")
        print("| processes | base held by each, MB | peak memory of each, MB | losses | seconds in all |")
        print("|---|---|---|---|---|")
        runs = {}
        for name in WAYS:
            found = runs[name] = train(place, name)
            held = f"{found['held'][1]:.0f} of {found['held'][0]:.0f}" if found["held"] else "all"
            losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
            peaks = ", ".join(f"{peak / 1e6:.0f}" for peak in found["peaks"])
            print(f"| {name} | {held} | {peaks} | {losses} | {found['seconds']:.0f} |", flush=True)
        strays = max(abs(a / b - 1) for a, b in zip(runs["two, whole"]["losses"], runs["one"]["losses"], strict=True))
        whole, divided = (sha256_of(runs[name]["folder"] / WEIGHTS) for name in ("two, whole", "two, divided"))
        print(f"\nlosses of two stray by at most {strays:.1e} from those of one")
        print(f"\nthe adapters of both pairs are {'the same bytes' if whole == divided else 'NOT the same bytes'}")
        print(f"\nthe divided run's adapter: {answers(place / 'base', runs['two, divided']['folder'])}")


if __name__ == "__main__":
    main()
