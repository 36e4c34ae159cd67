"""Decode tokens/s of our engine against PEFT's mixed batch and transformers' generate, on one NF4 base, in one run.

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

from adapterhub.adapter import BaseName
from adapterhub.base_model import load_base
from adapterhub.base_store import StoredBase, pull_base
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.lora_weights import LowRank
from serve.model_runner import ModelRunner
from serve.scheduler import BlockPool, Scheduler, SchedulerLimits, Sequence

PROMPT_TOKENS, RANK = 64, 16


def prompts(rows: int) -> list[list[int]]:
    return [random.Random(row).choices(range(1000, 40_000), k=PROMPT_TOKENS) for row in range(rows)]


class Ours:
    """The engine's runner and scheduler, without HTTP."""

    def __init__(self, stored: StoredBase, num_adapters: int, *, rank: int = RANK) -> None:
        self.runner = ModelRunner(load_base(stored, purpose="serve"), num_blocks=1024, block_size=16)
        bank = self.runner.adapters
        for number in range(num_adapters):
            torch.manual_seed(number)
            weights = {}
            for name, (group, place) in bank.places.items():
                layer = group.layers[place]
                if name != "lm_head":
                    a, bt = torch.randn(rank, layer.in_features), torch.randn(rank, layer.out_features)
                    weights[name] = LowRank(a * 0.02, bt * 0.02, scaling=1.0)
            bank.install(f"{number:04}", weights)

    def decode(self, rows: int, num_adapters: int, tokens: int) -> float:
        """Tokens/s of `tokens` steps with `rows` sequences on `num_adapters` distinct adapters (0: bare base)."""
        scheduler = Scheduler(SchedulerLimits(max_num_seqs=rows), BlockPool(1024, 16))
        for row, prompt in enumerate(prompts(rows)):
            mix = (AdapterScale(f"{row % num_adapters:04}"),) if num_adapters else ()
            sampling = SamplingParams(max_tokens=10_000, temperature=0)
            scheduler.add(Sequence.of(GenerationRequest(str(row), tuple(prompt), sampling, mix)))

        def step() -> None:
            batch = scheduler.schedule()
            assert batch is not None
            sampled = self.runner.run(batch)
            scheduler.commit(batch, {name: one.token for name, one in sampled.items()})

        while scheduler.waiting or any(sequence.num_pending > 1 for sequence in scheduler.running):
            step()
        step()
        start = time.perf_counter()
        for _ in range(tokens):
            step()
        return rows * tokens / (time.perf_counter() - start)


class Peft:
    """transformers' static-batch generate, bare or with PEFT's `adapter_names`, one adapter a row."""

    def __init__(self, stored: StoredBase, num_adapters: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.model: Any = load_base(stored, purpose="serve").model
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
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    stored = pull_base(BaseName.parse("smollm2-135m-instruct"), report=print)

    ours, mixed, bare = Ours(stored, 32), Peft(stored, 8), Peft(stored, 0)
    contenders: dict[str, Callable[[], float]] = {
        "ours, bare base, 1 row": lambda: ours.decode(1, 0, chosen.tokens),
        "ours, bare base, 8 rows": lambda: ours.decode(8, 0, chosen.tokens),
        "ours, 8 rows on 8 adapters": lambda: ours.decode(8, 8, chosen.tokens),
        "ours, 8 rows on 1 adapter": lambda: ours.decode(8, 1, chosen.tokens),
        "ours, bare base, 32 rows": lambda: ours.decode(32, 0, chosen.tokens),
        "ours, 32 rows on 32 adapters": lambda: ours.decode(32, 32, chosen.tokens),
        "ours, 32 rows on 1 adapter": lambda: ours.decode(32, 1, chosen.tokens),
        "PEFT, 8 rows on 8 adapters": lambda: mixed.decode(8, 8, chosen.tokens),
        "generate, bare base, 8 rows": lambda: bare.decode(8, 0, chosen.tokens),
    }
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(chosen.rounds + 1):
        for name, run in contenders.items():
            figure = run()
            if number:  # the first round warms up
                figures[name].append(figure)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    print(
        f"\nSmolLM2-135M NF4, rank {RANK} on all linear layers, {chosen.threads} thread(s), median of {chosen.rounds}\n"
    )
    print("| | decode tokens/s | min-max |\n|---|---|---|")
    for name, values in figures.items():
        print(f"| {name} | {medians[name]:.0f} | {min(values):.0f}-{max(values):.0f} |")
    print("\n| ratio | |\n|---|---|")
    for title, one, other in (
        ("32 adapters / 1 adapter, 32 rows", "ours, 32 rows on 32 adapters", "ours, 32 rows on 1 adapter"),
        ("8 adapters / 1 adapter, 8 rows", "ours, 8 rows on 8 adapters", "ours, 8 rows on 1 adapter"),
        ("8 adapters / bare base, 8 rows (the LoRA tax)", "ours, 8 rows on 8 adapters", "ours, bare base, 8 rows"),
        ("ours / PEFT, 8 rows on 8 adapters", "ours, 8 rows on 8 adapters", "PEFT, 8 rows on 8 adapters"),
        ("ours on 8 adapters / generate on the bare base", "ours, 8 rows on 8 adapters", "generate, bare base, 8 rows"),
        ("ours / generate, bare base, 8 rows", "ours, bare base, 8 rows", "generate, bare base, 8 rows"),
    ):
        print(f"| {title} | {medians[one] / medians[other]:.2f} |")


if __name__ == "__main__":
    main()
