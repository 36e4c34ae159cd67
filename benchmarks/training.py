"""Measure useful tokens/s and peak memory of a training step: our loop against TRL's SFTTrainer on one NF4 base.

    .venv/bin/pip install ".[bench]"
    .venv/bin/python benchmarks/training.py [--threads 1] [--rounds 3] [--steps 4] [--batch 8] [--only ours trl ...]

Data: the chatterbot corpus's topics mixed (lengths as people write them), the loss on the answers, LoRA of rank 16 on
all linear layers, AdamW, the same first weights, the same samples in the same order. Each contender is a process; they
take turns, one step to warm up. Useful tokens are those of the samples, padding not counted. Medians over rounds; peaks
are those of the process. Held-out loss is measured after all steps, in the same way for all. Against TRL's packing ours
takes the rows that TRL packed, so that a step learns from the same samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

TOPICS = ("trivia", "ai", "coding", "psychology", "emotion", "literature", "humor", "money")
RANK, ALPHA, RATE, MAX_LENGTH, HELD_OUT = 16, 32, 2e-4, 512, 48
CONTENDERS = {
    "ours": "ours, NF4",
    "ours-16": "ours, 16-bit base",
    "ours-peft": "ours, LoRA as PEFT chains it",
    "ours-alone": "ours, beginning computed for each sample",
    "ours-padded": "ours, samples padded to the longest",
    "ours-packed": "ours, on the rows that TRL packs",
    "trl": "TRL as it comes",
    "trl-kept": "TRL, activations kept",
    "trl-packing": "TRL, its packing",
    "trl-packing-kept": "TRL, its packing, activations kept",
}
DEFAULT = ("ours", "ours-16", "ours-packed", "trl", "trl-kept", "trl-packing", "trl-packing-kept")
PAIRS = (
    ("ours", "trl"), ("ours", "trl-kept"), ("ours-packed", "trl-packing"), ("ours-packed", "trl-packing-kept"),
    ("ours", "ours-16"), ("ours", "ours-peft"), ("ours", "ours-alone"),
    ("ours-alone", "ours-padded"), ("ours-padded", "trl-kept"),
    ("trl-kept", "trl"),
)  # fmt: skip


@dataclass(frozen=True)
class Taken:
    """Work of one training step."""

    tokens: int
    """Tokens of its samples, without padding."""
    flops: float = 0.0
    """Floating-point operations of products with weights: forward, and backward to inputs and trained weights."""


Step = Callable[[], Taken]


def samples() -> tuple[list[Any], list[Any]]:
    """Return the shuffled training samples and held-out samples."""
    import decode
    from transformers import AutoTokenizer

    from train.data.conversation import Source
    from train.data.sources import read_chatterbot
    from train.data.tokenization import prepare

    tokenizer = AutoTokenizer.from_pretrained(decode.stored_base().path)
    mixed = [conversation for topic in TOPICS for conversation in read_chatterbot(topic).examples]
    data = prepare(
        Source("chatterbot", tuple(mixed)), tokenizer, held_out=HELD_OUT, max_length=MAX_LENGTH, loss_on="assistant",
        seed=0,
    )  # fmt: skip
    train = list(data.train)
    random.Random(0).shuffle(train)
    return train, list(data.held_out)


def compute_dtype() -> str:
    """Return the dtype that our loop chooses, used by all: without instructions for it, bf16 is slower than fp32."""
    from adapterhub.bases.loading import choose_precision

    return choose_precision(None, None)[1].value


def draw_first_weights(model: Any) -> None:
    """Set A of every adapted layer to the same values for all contenders; B stays zero."""
    import torch

    draw = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw))


def as_rows(train: list[Any]) -> Any:
    """Return the samples as SFTTrainer takes them."""
    import datasets

    listed = [
        {"input_ids": list(sample.tokens), "completion_mask": [int(mark) for mark in sample.trained]}
        for sample in train
    ]
    # A name of its own: computing one pickles classes of pyarrow that cannot be pickled.
    return datasets.Dataset(datasets.table.InMemoryTable.from_pylist(listed), fingerprint="chatterbot")


def batches(train: list[Any], batch: int, *, is_packed: bool) -> Iterator[list[Any]]:
    """Yield the samples of each step, endlessly."""
    from train.data.tokenization import Sample

    if not is_packed:
        order = itertools.cycle(train)
        while True:
            yield list(itertools.islice(order, batch))
    from trl import pack_dataset

    for packed in itertools.cycle(pack_dataset(as_rows(train), MAX_LENGTH)):
        tokens, marks = iter(packed["input_ids"]), iter(packed["completion_mask"])
        yield [
            Sample(tuple(itertools.islice(tokens, length)), tuple(map(bool, itertools.islice(marks, length))))
            for length in packed["seq_lengths"]
        ]


def padded_loss(model: Any, row: list[Any]) -> Any:
    """Return the summed loss of a right-padded batch, with logits computed as in our loop."""
    import torch
    from torch.nn.functional import cross_entropy

    longest = max(len(sample.tokens) for sample in row)
    ids = torch.tensor([sample.tokens + (2,) * (longest - len(sample.tokens)) for sample in row])
    seen = torch.tensor([[1] * len(sample.tokens) + [0] * (longest - len(sample.tokens)) for sample in row])
    marks = torch.tensor([sample.trained + (False,) * (longest - len(sample.tokens)) for sample in row])
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
    logits = inner.lm_head(hidden[:, :-1][marks[:, 1:]])
    return cross_entropy(logits.float(), ids[:, 1:][marks[:, 1:]], reduction="sum")


def ours(name: str, batch: int) -> tuple[Step, Any]:
    import decode
    import torch

    from adapterhub.bases.loading import load_base
    from train.data import packing
    from train.loop.optimizer import make_optimizer
    from train.model.fused_lora import fuse_lora
    from train.model.lora import add_lora, trainable
    from train.objectives.evaluation import row_loss
    from train.recipe import LoraSection, TrainSection

    kind = "none" if name == "ours-16" else "nf4"
    base = load_base(decode.stored_base(), purpose="train", kind=kind, dtype=compute_dtype())  # type: ignore[arg-type]
    model = add_lora(base.model, LoraSection(rank=RANK, alpha=float(ALPHA)))
    if name != "ours-peft":
        fuse_lora(model)
    draw_first_weights(model)
    optimizer, _ = make_optimizer(trainable(model), TrainSection(steps=1, learning_rate=RATE))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    if name == "ours-alone":
        packing.common_prefix = lambda samples: 0
    weights = sum(parameter.numel() for parameter in trainable(model))
    head = model.get_output_embeddings().weight.numel()
    layers = model.get_base_model().model.layers.modules()
    frozen = sum(m.in_features * m.out_features for m in layers if hasattr(m, "lora_A"))
    rows = batches(samples()[0], batch, is_packed=name == "ours-packed")

    def step() -> Taken:
        samples_now = next(rows)
        model.train()
        trained, computed = sum(sample.num_trained for sample in samples_now), 0
        if name == "ours-padded":
            loss = padded_loss(model, samples_now)
        else:
            row = packing.pack(samples_now, device=model.device)
            loss, computed = row_loss(model, row), row.input_ids.numel()
        (loss / trained).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flops = computed * (4.0 * frozen + 6.0 * weights) + trained * 4.0 * head
        return Taken(sum(len(sample.tokens) for sample in samples_now), flops)

    return step, model


def trl(batch: int, *, steps: int, is_packed: bool, is_checkpointed: bool, turn: Callable[[Step], None]) -> Any:
    """Train `steps` steps, each run by the call of `turn`."""
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

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            outcome: Any = None

            def step() -> Taken:
                nonlocal outcome
                outcome = super(Trainer, self).training_step(model, inputs, *rest)
                # The optimizer's part of this step is done here, so that the clock sees it; theirs then finds nothing.
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.3)
                self.optimizer.step()
                self.optimizer.zero_grad()
                return Taken(tokens)

            turn(step)
            return outcome

    average = sum(len(sample.tokens) for sample in train) / len(train)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", report_to="none",
            save_strategy="no", use_cpu=True, bf16=False, max_length=MAX_LENGTH, packing=is_packed, seed=0,
            completion_only_loss=True,
            per_device_train_batch_size=max(1, round(batch * average / MAX_LENGTH)) if is_packed else batch,
            **({} if is_checkpointed else {"gradient_checkpointing": False}),
        )  # fmt: skip
        trainer = Trainer(
            model=base,
            args=config,
            train_dataset=as_rows(train),
            processing_class=AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        draw_first_weights(trainer.model)
        trainer.train()
    return trainer.model


def work(name: str, *, batch: int, steps: int) -> None:
    """Take a step per input line and write its tokens and seconds; at the end, write loss and peak memory."""
    out, sys.stdout = sys.stdout, sys.stderr

    def turn(step: Step) -> None:
        sys.stdin.readline()
        started = time.perf_counter()
        taken = step()
        print(json.dumps([taken.tokens, time.perf_counter() - started, taken.flops]), file=out, flush=True)

    if name.startswith("ours"):
        step, model = ours(name, batch)
        for _ in range(steps):
            turn(step)
    else:
        model = trl(
            batch,
            steps=steps,
            is_packed="packing" in name,
            is_checkpointed=not name.endswith("kept"),
            turn=turn,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    from train.objectives.evaluation import held_out_loss

    sys.stdin.readline()
    loss, _ = held_out_loss(model, samples()[1])
    print(json.dumps([loss, peak, base_bytes(model)]), file=out, flush=True)


def base_bytes(model: Any) -> int:
    """Return the bytes of the frozen weights and of their 4-bit constants."""
    from adapterhub.memory.estimate import constant_bytes
    from train.distributed.world import frozen_bytes

    codes = sum(p.nbytes for p in model.parameters() if not p.requires_grad and not p.is_floating_point())
    return frozen_bytes(model) + constant_bytes(2 * codes)


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


def matmul_rate(threads: int) -> float:
    """Return the operations per second of this machine in the contenders' dtype."""
    import torch

    torch.set_num_threads(threads)
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
    parser.add_argument("--steps", type=int, default=4, help="of each contender in a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(DEFAULT))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.work, batch=chosen.batch, steps=chosen.steps)
        return
    if find_spec("trl") is None:
        raise SystemExit('this benchmark compares with TRL, which is not installed: pip install "adapterhub[bench]"')
    workers = {name: Worker(name, chosen, 1 + chosen.rounds * chosen.steps) for name in chosen.only}
    rates: dict[str, list[float]] = {name: [] for name in workers}
    speeds: list[float] = []
    for worker in workers.values():
        worker.take()
    for _ in range(chosen.rounds):
        for name, worker in workers.items():
            taken = [worker.take() for _ in range(chosen.steps)]
            seconds = sum(step[1] for step in taken)
            rates[name].append(sum(step[0] for step in taken) / seconds)
            if name == "ours":
                speeds.append(sum(step[2] for step in taken) / seconds)
    ends = {name: worker.take() for name, worker in workers.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print("| | useful tokens/s | min-max | peak memory | held-out loss |\n|---|---|---|---|---|")
    for name, (loss, peak, _) in ends.items():
        span = f"{min(rates[name]):.0f}-{max(rates[name]):.0f}"
        print(f"| {CONTENDERS[name]} | {medians[name]:.0f} | {span} | {peak / 1e6:.0f} MB | {loss:.3f} |")
    if {"ours", "ours-16"} <= set(workers):
        held = {name: f"{ends[name][2] / 1e6:.0f} MB" for name in ("ours", "ours-16")}
        print(f"\nthe base takes {held['ours']} in NF4 and {held['ours-16']} in 16 bit, embedding and norms included")
    print("\n| ratio | tokens/s | peak memory | held-out loss |\n|---|---|---|---|")
    for one, other in [pair for pair in PAIRS if set(pair) <= set(workers)]:
        ratios = [medians[one] / medians[other]] + [ends[one][k] / ends[other][k] for k in (1, 0)]
        print(f"| {CONTENDERS[one]} / {CONTENDERS[other]} | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.3f} |")
    if speeds:
        reached, rate = statistics.median(speeds), matmul_rate(chosen.threads)
        print(
            f"\nours: {reached / 1e9:.0f} of this machine's {rate / 1e9:.0f} GFLOP/s in {compute_dtype()} products, "
            f"{reached / rate:.0%} (products with weights; attention and everything else is in the time only)"
        )


if __name__ == "__main__":
    main()
