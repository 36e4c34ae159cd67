"""Useful tokens/s and peak memory of a training step: our loop against TRL's SFTTrainer, on one NF4 base, in one run.

    .venv/bin/pip install trl==1.16.0
    .venv/bin/python benchmarks/training.py [--threads 1] [--rounds 3] [--steps 2] [--batch 8]

Data: the chatterbot corpus' topics mixed (lengths as people write them), the loss on the answers, LoRA of rank 16 on
all linear layers, AdamW, the same samples in the same order. Each contender is a process; they take turns, one round
to warm up. Useful tokens are those of the samples, padding not counted. Medians over rounds; peaks are the process'.
Held-out loss is measured after all steps, in the same way for all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

TRL = "trl==1.16.0"
TOPICS = ("trivia", "ai", "coding", "psychology", "emotion", "literature", "humor", "money")
RANK, ALPHA, RATE, MAX_LENGTH, HELD_OUT = 16, 32, 2e-4, 512, 48
CONTENDERS = {
    "ours": "ours, NF4",
    "ours-16": "ours, 16-bit base",
    "trl": "TRL as it comes",
    "trl-no-checkpoints": "TRL, activations kept",
    "trl-packing": "TRL, its packing",
    "trl-packing-no-checkpoints": "TRL, its packing, activations kept",
}
Step = Callable[[], int]
"""trains one step and returns its useful tokens"""


def samples() -> tuple[list[Any], list[Any]]:
    """(to train on, held out), shuffled."""
    import decode
    from transformers import AutoTokenizer

    from train.data import prepare
    from train.formats import Source, read_chatterbot

    tokenizer = AutoTokenizer.from_pretrained(decode.stored_base().path)
    mixed = [conversation for topic in TOPICS for conversation in read_chatterbot(topic).conversations]
    data = prepare(
        Source("chatterbot", tuple(mixed)), tokenizer, held_out=HELD_OUT, max_length=MAX_LENGTH, loss_on="assistant",
        seed=0,
    )  # fmt: skip
    train = list(data.train)
    random.Random(0).shuffle(train)
    return train, list(data.held_out)


def compute_dtype() -> str:
    """What our loop chooses on this machine, for all: bf16 without instructions for it is far slower than fp32."""
    from adapterhub.base_model import choose_precision

    return choose_precision(None, None)[1].value


def ours(kind: str, batch: int) -> tuple[Step, Any]:
    import decode
    import torch

    from adapterhub.base_model import load_base
    from train.evaluate import row_loss
    from train.lora import add_lora, trainable
    from train.optimizer import make_optimizer
    from train.packing import pack
    from train.recipe import LoraSection, TrainSection

    torch.manual_seed(0)
    base = load_base(decode.stored_base(), purpose="train", kind=kind, dtype=compute_dtype())  # type: ignore[arg-type]
    model = add_lora(base.model, LoraSection(rank=RANK, alpha=float(ALPHA)))
    optimizer, _ = make_optimizer(trainable(model), TrainSection(steps=1, learning_rate=RATE))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    train, _ = samples()
    place = 0

    def step() -> int:
        nonlocal place
        row = [train[number % len(train)] for number in range(place, place + batch)]
        place += batch
        model.train()
        loss = row_loss(model, pack(row, device=model.device, dtype=model.dtype))
        (loss / sum(sample.num_trained for sample in row)).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(len(sample.tokens) for sample in row)

    return step, model


def trl(batch: int, *, steps: int, is_packed: bool, is_checkpointed: bool, turn: Callable[[Step], None]) -> Any:
    """Trains `steps` steps; `turn` is called for each, and calls it."""
    import datasets
    import decode
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype()),
    )
    path = decode.stored_base().path
    base = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, compute_dtype()), quantization_config=quantization
    )
    train, _ = samples()
    listed = [
        {"input_ids": list(sample.tokens), "completion_mask": [int(mark) for mark in sample.trained]}
        for sample in train
    ]
    # A name of its own: computing one pickles classes of pyarrow that cannot be pickled.
    rows = datasets.Dataset(datasets.table.InMemoryTable.from_pylist(listed), fingerprint="chatterbot")

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            outcome: Any = None

            def step() -> int:
                nonlocal outcome
                outcome = super(Trainer, self).training_step(model, inputs, *rest)
                # The optimizer's part of this step is done here, so that the clock sees it; theirs then finds nothing.
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.3)
                self.optimizer.step()
                self.optimizer.zero_grad()
                return tokens

            turn(step)
            return outcome

    average = sum(len(sample.tokens) for sample in train) / len(train)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", report_to="none",
            save_strategy="no", use_cpu=True, bf16=False, max_length=MAX_LENGTH, packing=is_packed, seed=0,
            per_device_train_batch_size=max(1, round(batch * average / MAX_LENGTH)) if is_packed else batch,
            **({} if is_checkpointed else {"gradient_checkpointing": False}),
        )  # fmt: skip
        trainer = Trainer(
            model=base,
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
    return trainer.model


def work(name: str, *, batch: int, steps: int) -> None:
    """Wait for a line, take a step, write a line with its tokens and seconds; at the end loss and peak memory."""
    out, sys.stdout = sys.stdout, sys.stderr

    def turn(step: Step) -> None:
        sys.stdin.readline()
        started = time.perf_counter()
        tokens = step()
        print(json.dumps([tokens, time.perf_counter() - started]), file=out, flush=True)

    if name.startswith("ours"):
        step, model = ours("nf4" if name == "ours" else "none", batch)
        for _ in range(steps):
            turn(step)
    else:
        model = trl(
            batch,
            steps=steps,
            is_packed="packing" in name,
            is_checkpointed="no-checkpoints" not in name,
            turn=turn,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from train.evaluate import held_out_loss

    sys.stdin.readline()
    loss, _ = held_out_loss(model, samples()[1])
    print(json.dumps([loss, peak]), file=out, flush=True)


class Worker:
    def __init__(self, name: str, chosen: argparse.Namespace, steps: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", name, "--batch", str(chosen.batch), "--steps", str(steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=None if chosen.verbose else subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(chosen.threads), "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip

    def take(self) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args[3]} ended; --verbose shows why")  # type: ignore[index]
        found: list[float] = json.loads(line)
        return found


def matmul_rate() -> float:
    """Operations a second of this machine in the dtype the contenders compute in."""
    import torch

    dtype = getattr(torch, compute_dtype())
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2.0 * left.numel() * right.shape[1] / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of each contender in a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.work, batch=chosen.batch, steps=chosen.steps)
        return
    if any(name.startswith("trl") for name in chosen.only) and find_spec("trl") is None:
        raise SystemExit(f"this benchmark compares with TRL, which is not installed: pip install {TRL}")
    steps = 1 + chosen.rounds * chosen.steps
    workers = {name: Worker(name, chosen, steps) for name in chosen.only}
    rates: dict[str, list[float]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.take()
    for _ in range(chosen.rounds):
        for name, worker in workers.items():
            taken = [worker.take() for _ in range(chosen.steps)]
            rates[name].append(sum(tokens for tokens, _ in taken) / sum(seconds for _, seconds in taken))
    ends = {name: worker.take() for name, worker in workers.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print("| | useful tokens/s | min-max | peak memory | held-out loss |\n|---|---|---|---|---|")
    for name, (loss, peak) in ends.items():
        span = f"{min(rates[name]):.0f}-{max(rates[name]):.0f}"
        print(f"| {CONTENDERS[name]} | {medians[name]:.0f} | {span} | {peak / 1e6:.0f} MB | {loss:.3f} |")
    print("\n| ratio | tokens/s | peak memory |\n|---|---|---|")
    for name in [name for name in workers if name != "ours" and "ours" in workers]:
        memory = ends["ours"][1] / ends[name][1]
        print(f"| ours / {CONTENDERS[name]} | {medians['ours'] / medians[name]:.2f} | {memory:.2f} |")
    if "ours" in workers:
        # 106 M frozen weights take a forward and a backward to their inputs, 4.9 M trained ones also to themselves.
        share = medians["ours"] * (4 * 106.2e6 + 6 * 4.9e6) / matmul_rate()
        print(f"\nours reaches {share:.0%} of this machine's {compute_dtype()} matmul rate without head and attention")


if __name__ == "__main__":
    main()
