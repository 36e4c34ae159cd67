"""Measure decode tokens/s of our engine, PEFT's mixed batch and transformers' generate on one NF4 base.

    .venv/bin/python benchmarks/decode.py [--threads 1] [--rounds 5] [--tokens 24]

Every contender decodes the same prompts greedily with random rank-16 adapters on all linear layers. Contenders take
turns within each round; reported are medians over rounds and ratios of medians. Prefill is not counted.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command sets it

import torch

from adapterhub.adapter import BaseName, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.bases.store import pull_base
from serve.adapters.weights import LowRank, Weights
from serve.config import SchedulerLimits
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine.cpu.kernels import load_kernels
from serve.local_engine.lora_layers import AdapterBank
from serve.local_engine.model_runner import ModelRunner
from serve.local_engine.scheduler import BlockPool, Scheduler, Sequence

PROMPT_TOKENS, RANK = 32, 16


def prompts(rows: int) -> list[list[int]]:
    return [random.Random(row).choices(range(1000, 40_000), k=PROMPT_TOKENS) for row in range(rows)]


def stored_base() -> StoredBase:
    return pull_base(BaseName.parse("smollm2-135m-instruct"), report=print)


def random_adapter(bank: AdapterBank, number: int, rank: int = RANK) -> Weights:
    """Return random A and B matrices for every linear layer except the head."""
    torch.manual_seed(number)
    weights: Weights = {}
    for name, (group, place) in bank.places.items():
        layer = group.layers[place]
        if name != "lm_head":
            a, bt = torch.randn(rank, layer.in_features), torch.randn(rank, layer.out_features)
            weights[name] = LowRank(a * 0.02, bt * 0.02, scaling=1.0)
    return bank.prepare(f"{number:04}", weights)


def server_dtype() -> str | None:
    """Return the dtype that the server would choose here."""
    return "float32" if load_kernels()[0] is not None else None


class Ours:
    """The engine's runner and scheduler, without HTTP."""

    def __init__(self, stored: StoredBase, num_adapters: int, *, rank: int = RANK, dtype: str | None = None) -> None:
        base = load_base(stored, purpose="serve", dtype=dtype or server_dtype())
        self.runner = ModelRunner(base, num_blocks=1024, block_size=16)
        for number in range(num_adapters):
            self.runner.adapters.install(f"{number:04}", random_adapter(self.runner.adapters, number, rank))

    def decode(self, rows: int, num_adapters: int, tokens: int) -> float:
        """Return tokens/s over `tokens` steps of `rows` sequences on `num_adapters` adapters (0: the bare base)."""
        scheduler = Scheduler(SchedulerLimits(max_num_seqs=rows), BlockPool(1024, 16))
        for row, prompt in enumerate(prompts(rows)):
            mix = (AdapterScale(f"{row % num_adapters:04}"),) if num_adapters else ()
            sampling = SamplingParams(max_tokens=10_000, temperature=0)
            scheduler.add(Sequence.of(GenerationRequest(str(row), tuple(prompt), sampling, mix)))

        def step() -> None:
            batch = scheduler.schedule()
            assert batch is not None
            rows, sequences = self.runner.run(batch), {one.request.id: one for one in scheduler.running}
            sampled = {name: self.runner.sampler.sample(row, sequences[name]) for name, row in rows.items()}
            scheduler.commit(batch, {name: one.token for name, one in sampled.items()})

        while scheduler.waiting or any(sequence.num_pending > 1 for sequence in scheduler.running):
            step()
        step()
        start = time.perf_counter()
        for _ in range(tokens):
            step()
        return rows * tokens / (time.perf_counter() - start)


class Peft:
    """The static-batch generate of transformers, bare or with PEFT's `adapter_names`, one adapter per row."""

    def __init__(self, stored: StoredBase, num_adapters: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.model: Any = load_base(stored, purpose="serve", dtype=server_dtype()).model
        if num_adapters:
            config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, config, adapter_name="0000")
            for number in range(1, num_adapters):
                self.model.add_adapter(f"{number:04}", config)
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        self.model.eval()

    def decode(self, rows: int, num_adapters: int, tokens: int) -> float:
        ids = torch.tensor(prompts(rows))
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        if num_adapters:
            options["adapter_names"] = [f"{row % num_adapters:04}" for row in range(rows)]

        def seconds(new_tokens: int) -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options
                )
            assert out.shape[1] == PROMPT_TOKENS + new_tokens
            return time.perf_counter() - start

        return rows * tokens / (seconds(tokens + 1) - seconds(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--plot", metavar="FILE.png", help="also draw throughput against the number of adapters")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    stored = stored_base()

    ours, low, mixed, bare = Ours(stored, 32), Ours(stored, 32, rank=8), Peft(stored, 8), Peft(stored, 0)
    for choice in ours.runner.choices:
        print(choice)
    tokens = chosen.tokens
    contenders: dict[str, Callable[[], float]] = {
        "ours, bare base, 1 row": lambda: ours.decode(1, 0, tokens),
        "ours, bare base, 8 rows": lambda: ours.decode(8, 0, tokens),
        "ours, 8 rows on 8 adapters": lambda: ours.decode(8, 8, tokens),
        "ours, 8 rows on 1 adapter": lambda: ours.decode(8, 1, tokens),
        "ours, bare base, 32 rows": lambda: ours.decode(32, 0, tokens),
        "ours, 32 rows on 32 adapters": lambda: ours.decode(32, 32, tokens),
        "ours, 32 rows on 8 adapters": lambda: ours.decode(32, 8, tokens),
        "ours, 32 rows on 1 adapter": lambda: ours.decode(32, 1, tokens),
        "ours, rank 8, 32 rows on 32 adapters": lambda: low.decode(32, 32, tokens),
        "ours, rank 8, 32 rows on 1 adapter": lambda: low.decode(32, 1, tokens),
        "PEFT, 8 rows on 8 adapters": lambda: mixed.decode(8, 8, tokens),
        "generate, bare base, 8 rows": lambda: bare.decode(8, 0, tokens),
    }
    figures = take_turns(contenders, chosen.rounds)
    print(
        f"\nSmolLM2-135M NF4, rank {RANK} on all linear layers, {chosen.threads} thread(s), median of {chosen.rounds}\n"
    )
    print_table(figures)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    print_ratios(medians, RATIOS)
    if chosen.plot:
        plot({n: [ours.decode(32, n, tokens) for _ in range(chosen.rounds)] for n in (1, 2, 4, 8, 16, 32)}, chosen.plot)


RATIOS = [
    ("32 adapters / 1 adapter, 32 rows, rank 16", "ours, 32 rows on 32 adapters", "ours, 32 rows on 1 adapter"),
    ("32 adapters / 1 adapter, 32 rows, rank 8", "ours, rank 8, 32 rows on 32 adapters",
     "ours, rank 8, 32 rows on 1 adapter"),
    ("8 adapters / 1 adapter, 32 rows", "ours, 32 rows on 8 adapters", "ours, 32 rows on 1 adapter"),
    ("8 adapters / 1 adapter, 8 rows", "ours, 8 rows on 8 adapters", "ours, 8 rows on 1 adapter"),
    ("8 adapters / bare base, 8 rows (the LoRA tax)", "ours, 8 rows on 8 adapters", "ours, bare base, 8 rows"),
    ("ours / PEFT, 8 rows on 8 adapters", "ours, 8 rows on 8 adapters", "PEFT, 8 rows on 8 adapters"),
    ("ours on 8 adapters / generate on the bare base", "ours, 8 rows on 8 adapters", "generate, bare base, 8 rows"),
    ("ours / generate, bare base, 8 rows", "ours, bare base, 8 rows", "generate, bare base, 8 rows"),
]  # fmt: skip


def take_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return tokens/s of each contender per round; the first round warms up and is not counted."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            figure = run()
            if number:
                figures[name].append(figure)
    return figures


def print_table(figures: dict[str, list[float]]) -> None:
    print("| | decode tokens/s | min-max |\n|---|---|---|")
    for name, values in figures.items():
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f}-{max(values):.0f} |")


def print_ratios(medians: dict[str, float], ratios: list[tuple[str, str, str]]) -> None:
    print("\n| ratio | |\n|---|---|")
    for title, one, other in ratios:
        print(f"| {title} | {medians[one] / medians[other]:.2f} |")


def plot(figures: dict[int, list[float]], path: str) -> None:
    """Plot throughput against the number of distinct adapters, for 32 rows."""
    import matplotlib.pyplot as plt

    plt.figure(figsize=(6, 3.5))
    plt.plot(list(figures), [statistics.median(values) for values in figures.values()], marker="o")
    plt.ylim(bottom=0)
    plt.xscale("log", base=2)
    plt.xticks(list(figures), [str(count) for count in figures])
    plt.xlabel("distinct adapters among 32 requests (rank 16, all linear layers)")
    plt.ylabel("decode tokens/s")
    plt.grid(alpha=0.3)
    plt.tight_layout()
    plt.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
