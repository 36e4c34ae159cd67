"""The training run, from a recipe and a base to an adapter folder, in numbered paragraphs. Publishes nothing."""

from __future__ import annotations

import hashlib
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import AutoTokenizer

from adapterhub.base_model import LoadedBase, load_base
from adapterhub.base_store import StoredBase
from adapterhub.errors import BaseNotFound, OutputNotFresh, TrainingFailed, UsageError
from adapterhub.files import new_folder
from adapterhub.manifest import Evaluation
from adapterhub.package import TEMPLATE_NAME
from adapterhub.run_record import LOG_NAME, RECIPE_NAME, RunEnd, RunStart, RunStep
from train.data import Sample, TokenData, prepare, read_source
from train.evaluate import held_out_loss, row_loss
from train.lora import add_lora, save_lora, trainable
from train.packing import pack
from train.progress import Progress, peak_memory_bytes, progress_on
from train.recipe import Recipe
from train.schedule import learning_rate_at, step_batches

_VERSIONS_OF = ("adapterhub", "torch", "transformers", "peft", "bitsandbytes")


def load_data(recipe: Recipe, base: StoredBase) -> TokenData:
    """The recipe's data as tokens of this base; seconds, no weights. Raises DatasetError, BaseNotFound."""
    source = read_source(recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"{base.path} has no tokenizer that can be loaded: {error}") from error
    return prepare(
        source,
        tokenizer,
        held_out=recipe.data.held_out,
        max_length=recipe.data.max_length,
        loss_on=recipe.train.loss_on,
        seed=recipe.seed,
    )


def fit(recipe: Recipe, base: StoredBase, output: Path, *, progress: Progress | None = None) -> RunEnd:
    """Train the recipe's adapter into `output`, a folder that is new or empty; it appears only when complete.

    The same recipe, seed, machine and thread count give the same bytes; torch's global seed is set. `progress`
    shows the run on stderr when not given. Raises OutputNotFresh, RecipeError, DatasetError, BaseNotFound,
    UsageError, StorageFull, and TrainingFailed when the loss is no number or memory runs out; nothing
    half-written stays, whatever ends the run.
    """
    progress = progress or progress_on(sys.stderr)
    _check_fresh(output)
    try:
        # 1. The data, before anything expensive.
        data = load_data(recipe, base)
        _say_data(data, recipe, progress)

        with (
            new_folder(output) as folder,
            _memory_errors_named(),
            (folder / LOG_NAME).open("w", encoding="utf-8") as log,
        ):
            ours = folder.stat().st_ino
            # 2. The base, quantized, and on it the new layers, drawn from the seed.
            torch.manual_seed(recipe.seed)
            kind, dtype = recipe.quantization.kind, recipe.quantization.compute_dtype
            loaded = load_base(base, purpose="train", kind=kind, dtype=None if dtype == "auto" else dtype)
            _check_window(loaded, data)
            model = add_lora(loaded.model, recipe.lora)
            _say_model(model, loaded, progress)

            # 3. The record opens, and beside it go the recipe and the template trained with.
            (folder / RECIPE_NAME).write_text(recipe.to_toml(), encoding="utf-8")
            (folder / TEMPLATE_NAME).write_text(loaded.tokenizer.get_chat_template(), encoding="utf-8")
            _write(log, _start(recipe, loaded, data))

            # 4. What the base alone makes of the held-out questions.
            with model.disable_adapter():
                before = held_out_loss(model, data.held_out)[0]

            # 5. The steps.
            started = time.perf_counter()
            trained_tokens = 0
            for done in _steps(recipe, model, data, progress):
                _write(log, done)
                trained_tokens += done.trained_tokens
            seconds = time.perf_counter() - started

            # 6. The same questions again, the weights, and the record's end.
            after, tokens = held_out_loss(model, data.held_out)
            save_lora(model, folder, base=base.ref)
            end = RunEnd(
                steps=recipe.train.num_steps(len(data.train)),
                trained_tokens=trained_tokens,
                seconds=round(seconds, 3),
                peak_memory_bytes=_peak_bytes(model),
                evaluations=_evaluations(data, before, after, tokens),
            )
            _write(log, end)
    finally:
        progress.close()
    _check_ours(output, ours)
    return end


def _steps(recipe: Recipe, model: Any, data: TokenData, progress: Progress) -> Iterator[RunStep]:
    """Take each step of the recipe and yield its figures. Raises TrainingFailed when a figure is no number."""
    train, total = recipe.train, recipe.train.num_steps(len(data.train))
    parameters = trainable(model)
    # torch's fused AdamW: LoRA's moments are small (8 bytes a trainable parameter), so the paged and 8-bit
    # optimizers QLoRA uses for large adapters would save little here.
    optimizer = torch.optim.AdamW(parameters, weight_decay=train.weight_decay, fused=True)
    model.train()
    for number, places in enumerate(step_batches(len(data.train), train=train, seed=recipe.seed), start=1):
        started = time.perf_counter()
        rate = learning_rate_at(number, of=total, train=train)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [[data.train[place] for place in row] for row in places]
        loss = _backward(model, batches)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingFailed(
                f"at step {number} of {total} the loss is {loss} and the gradient norm {norm}: lower learning_rate "
                f"(now {train.learning_rate:g}), or set compute_dtype to float32."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        samples = [sample for batch in batches for sample in batch]
        done = RunStep(
            step=number,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(sample.tokens) for sample in samples),
            trained_tokens=sum(sample.num_trained for sample in samples),
            seconds=round(time.perf_counter() - started, 4),
        )
        progress.step(done, of=total)
        yield done
        if train.evaluate_every and number % train.evaluate_every == 0 and data.held_out:
            progress.say(f"step {number}: held-out loss {held_out_loss(model, data.held_out)[0]:.3f}")


def _backward(model: Any, batches: Sequence[Sequence[Sample]]) -> float:
    """Gradients of the mean loss over the trained tokens of all batches together, which is returned (nats).

    A mean of the batches' means would weigh tokens by how many share their batch.
    """
    num_trained = sum(sample.num_trained for batch in batches for sample in batch)
    total = 0.0
    for batch in batches:
        loss = row_loss(model, pack(batch, device=model.device, dtype=model.dtype)) / num_trained
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _check_fresh(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise OutputNotFresh(f"{output} already exists: name a new folder, or move this one away first.")


def _check_ours(output: Path, inode: int) -> None:
    """`new_folder` lets a folder win that appeared meanwhile; a run of hours must not be lost unsaid."""
    if not output.is_dir() or output.stat().st_ino != inode:
        raise OutputNotFresh(f"{output} was made by another process during the run, and this run is lost: train again.")


def _check_window(loaded: LoadedBase, data: TokenData) -> None:
    """A packed row's mask knows nothing of sliding windows, which matter only to samples longer than one."""
    window = getattr(loaded.model.config, "sliding_window", None)
    longest = max(len(sample.tokens) for sample in (*data.train, *data.held_out))
    if window and longest > window:
        raise UsageError(
            f"the base attends within {window} tokens and the longest sample has {longest}: "
            f"set max_length = {window} or less."
        )


@contextmanager
def _memory_errors_named() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class for CUDA only; on a CPU its allocator raises a plain RuntimeError.
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        raise TrainingFailed(
            "memory ran out: halve batch_size and double gradient_accumulation (the result is the same), "
            "or lower max_length."
        ) from error


def _start(recipe: Recipe, loaded: LoadedBase, data: TokenData) -> RunStart:
    return RunStart(
        base_id=loaded.ref.id,
        base_revision=loaded.ref.revision,
        base_fingerprint=str(loaded.ref.fingerprint),
        quantization=loaded.quantization,
        recipe_sha256=hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        data_sha256=data.digest,
        samples=len(data.train),
        seed=recipe.seed,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS_OF}},
    )


def _evaluations(data: TokenData, before: float, after: float, tokens: int) -> list[Evaluation]:
    if not tokens:
        return []
    name = f"{data.name}, {len(data.held_out)} held-out questions"
    return [Evaluation(data=name, tokens=tokens, base_loss=round(before, 4), adapter_loss=round(after, 4))]


def _say_data(data: TokenData, recipe: Recipe, progress: Progress) -> None:
    progress.say(
        f"{data.name}: {len(data.train)} samples to train on ({data.num_tokens:,} tokens, {data.num_trained:,} "
        f"trained), {len(data.held_out)} held out; {recipe.train.num_steps(len(data.train))} steps"
    )
    for note in data.notes:
        progress.say(f"note: {note}")


def _say_model(model: Any, loaded: LoadedBase, progress: Progress) -> None:
    for choice in loaded.choices:
        progress.say(str(choice))
    progress.say("optimizer: AdamW, fused (LoRA's moments are small: no paging needed)")
    progress.say(f"{sum(parameter.numel() for parameter in trainable(model)):,} trainable parameters")


def _peak_bytes(model: Any) -> int:
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    return peak_memory_bytes()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _write(log: TextIO, event: RunStart | RunStep | RunEnd) -> None:
    log.write(event.model_dump_json() + "\n")
    log.flush()
