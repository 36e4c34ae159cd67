"""The training run, from a recipe and a base to an adapter folder, in numbered paragraphs. Publishes nothing."""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.loading import LoadedBase, load_base
from adapterhub.choice import Choice
from adapterhub.errors import DatasetError, OutputNotFresh, RunNotResumable, UsageError
from adapterhub.files import new_folder
from adapterhub.package.layout import TEMPLATE_NAME, open_adapter
from adapterhub.package.run_record import LOG_NAME, RECIPE_NAME, REPORT_NAME, RunEnd, RunStart, RunStep
from train.distributed.world import World, current_world, held_bytes, shard_base
from train.inputs import Inputs, load_inputs, with_lora_of
from train.loop.lora_init import start_lora
from train.loop.optimizer import make_optimizer
from train.loop.progress import Progress, peak_memory_bytes, progress_on
from train.loop.run_folder import Listener, RunFolder, check_fresh
from train.loop.steps import TrainingLoop, check_bare, check_finite, log_answers
from train.loop.stopping import stop_wishes
from train.model.fused_lora import fuse_lora
from train.model.lora import continue_lora, lora_b_parameters, trainable
from train.model.methods import adapter_disabled, attach, configure_forward, save_trained
from train.objectives.base import EvalResult, Objective
from train.objectives.mask_report import mask_report
from train.objectives.sample_answers import FixedPrompts
from train.planning.out_of_memory import memory_errors_named
from train.planning.plan import MemoryItem, planned_memory
from train.planning.preflight import check_room
from train.recipe import Recipe
from train.reporting.html_report import report

_VERSIONS_OF = ("adapterhub", "torch", "transformers", "peft", "bitsandbytes")


def fit(
    recipe: Recipe, base: StoredBase, output: Path, *, start: Adapter | None = None, progress: Progress | None = None,
    listen: Listener | None = None,
) -> RunEnd:  # fmt: skip
    """Train the recipe's adapter, a new one or going on from `start`, into `output`, a folder that is new or empty.

    `output` appears only when complete; until then the run lives in a folder beside it (loop/run_folder.py) and can
    be stopped and resumed. The same recipe, seed, machine and thread count give the same bytes, also when stopped
    and resumed; torch's global seed is set. `progress` shows the run on stderr when not given; `listen` is called with
    each event of the record.

    Raises OutputNotFresh, RecipeError, DatasetError, BaseNotFound, IncompatibleBase, UsageError, StorageFull,
    TrainingStopped after SIGINT or SIGTERM, and TrainingFailed when the loss is no number or memory runs out.
    """
    progress = progress or progress_on(sys.stderr)
    try:
        check_fresh(output)
        recipe = with_lora_of(recipe, start)
        # 1. The data, before anything expensive.
        inputs = _load(recipe, base, start, progress)
        memory = planned_memory(recipe, base, inputs.objective)
        with RunFolder.create(output, recipe, start=start) as run, memory_errors_named(memory):
            run.listen = listen
            return _train(run, base, inputs, start, memory, progress)
    finally:
        progress.close()


def resume(
    output: Path, base: StoredBase, *, progress: Progress | None = None, listen: Listener | None = None
) -> RunEnd:
    """Go on with the run that was to become `output`, from its newest checkpoint. Raises as `fit` does, and
    RunNotResumable when there is no such run, or data or base are no longer what it began with."""
    progress = progress or progress_on(sys.stderr)
    try:
        with RunFolder.reopen(output) as run:
            if (end := run.finished()) is not None:
                run.remove()
                return end
            start = open_adapter(run.start) if run.start else None
            inputs = _load(run.recipe, base, start, progress)
            run.listen = listen
            memory = planned_memory(run.recipe, base, inputs.objective)
            with memory_errors_named(memory):
                return _train(run, base, inputs, start, memory, progress)
    finally:
        progress.close()


def _load(recipe: Recipe, base: StoredBase, start: Adapter | None, progress: Progress) -> Inputs:
    inputs = load_inputs(recipe, base, start=start)
    objective = inputs.objective
    progress.say(f"{objective.describe()}; {recipe.train.num_steps(objective.num_samples)} steps")
    report = mask_report(objective, inputs.tokenizer)
    progress.say(f"masks: {report.summary}")
    report.check()
    for note in (*objective.notes, *report.notes):
        progress.say(f"note: {note}")
    return inputs


def _train(
    run: RunFolder, base: StoredBase, inputs: Inputs, start: Adapter | None, memory: Sequence[MemoryItem],
    progress: Progress,
) -> RunEnd:  # fmt: skip
    recipe, objective = run.recipe, inputs.objective
    # 2. The base, quantized, and on it the adapter: drawn from the seed, or the one to go on from.
    torch.manual_seed(recipe.seed)
    world = current_world()
    arguments = {"device": world.device, "tokenizer": inputs.tokenizer} | recipe.base_arguments()
    loaded = load_base(base, purpose="train", **arguments)
    _check_window(loaded, objective)
    if start is None:
        model = attach(loaded.model, recipe)
        start_lora(model, recipe.lora, base=base.path, objective=objective)
    else:
        model = configure_forward(continue_lora(loaded.model, start, dropout=recipe.lora.dropout), recipe)
    fuse_lora(model)
    optimizer, chosen = make_optimizer(trainable(model), recipe.train, lora_b_parameters=lora_b_parameters(model))
    check_room(run.output, trainable(model), recipe)
    _say_model(model, (*loaded.choices, chosen), progress)
    _divide(model, world, progress)

    # 3. The record opens, or goes on where the newest checkpoint left it.
    _open_record(run, _start_event(recipe, loaded, inputs, start))
    asked = recipe.train.prompts if recipe.train.sample_every else ()
    prompts = FixedPrompts(asked, loaded.tokenizer, stop=inputs.stop)

    # 4. What the bare base and the start make of the held-out questions.
    objective.set_reference(model)
    with adapter_disabled(model):
        bare = objective.measure(model)
        if run.newest is None:
            log_answers(run, 0, prompts.answer(model))
    # Only preference tuning tells what training started from apart from the bare base.
    is_other = start or recipe.lora.init == "loftq" or recipe.method in ("prompt", "prefix")
    before = objective.measure(model) if recipe.preference and is_other else bare
    _check_measures(recipe, bare)
    check_bare(bare)
    check_finite(run, "the adapter that training starts from", before)

    # 5. The steps.
    course = TrainingLoop(run, model, optimizer, objective, base, progress, prompts)
    with stop_wishes() as wish:
        state = course.steps(course.restored(), wish)

    # 6. The same questions again, and the folder.
    after = course.result(state)
    check_finite(run, "the trained adapter", after)
    events = run.events()
    taken = [event for event in events if isinstance(event, RunStep)]
    end = RunEnd(
        steps=state.step,
        trained_tokens=sum(step.trained_tokens for step in taken),
        seconds=round(sum(step.seconds for step in taken), 3),
        peak_memory_bytes=_peak_bytes(model),
        evaluations=objective.evaluations(base=bare, before=before, after=after),
        answers=prompts.answer(model),
    )
    run.log(end)
    _write_adapter_folder(run, model, loaded, report(recipe, [*events, end], memory, objective, loaded))
    return end


def _write_adapter_folder(run: RunFolder, model: Any, loaded: LoadedBase, page: str) -> None:
    """The output, whole or not at all; then the run's own folder has served."""
    with new_folder(run.output) as folder:
        ours = folder.stat().st_ino
        save_trained(model, folder, base=loaded.ref, tokenizer=loaded.tokenizer)
        (folder / TEMPLATE_NAME).write_text(loaded.tokenizer.get_chat_template(), encoding="utf-8")
        (folder / REPORT_NAME).write_text(page, encoding="utf-8")
        for name in (RECIPE_NAME, LOG_NAME):
            shutil.copyfile(run.path / name, folder / name)
    # `new_folder` lets a folder win that appeared meanwhile; a run of hours must not be lost unsaid.
    if not run.output.is_dir() or run.output.stat().st_ino != ours:
        raise OutputNotFresh(
            f"{run.output} was made by another process during the run: move it away, then `adapterhub train --resume "
            f"{run.output}` writes this one."
        )
    run.remove()


def _open_record(run: RunFolder, start: RunStart) -> None:
    events = run.events()
    if not events:
        run.log(start)
        return
    began = events[0]
    if not isinstance(began, RunStart):
        raise RunNotResumable(f"{run.path / LOG_NAME} has lost its beginning: train again into a fresh folder.")
    for what, then, now in (
        ("the data", began.data_sha256, start.data_sha256),
        ("the base", began.base_fingerprint, start.base_fingerprint),
        ("the adapter to go on from", began.start_digest, start.start_digest),
    ):
        if then != now:
            raise RunNotResumable(
                f"{what} of {run.output} is no longer what the run began with ({then} then, {now} now): restore it, "
                "or train again into a fresh folder."
            )


def _check_measures(recipe: Recipe, bare: EvalResult) -> None:
    if not bare.tokens and (recipe.train.keep == "best" or recipe.train.patience):
        raise DatasetError("keep = best and patience need held-out samples, and the split left none: raise held_out.")


def _check_window(loaded: LoadedBase, objective: Objective) -> None:
    """A packed row's mask knows nothing of sliding windows, which matter only to samples longer than one."""
    window = getattr(loaded.model.config, "sliding_window", None)
    longest = objective.longest
    if window and longest > window:
        raise UsageError(
            f"the base attends within {window} tokens and the longest sample has {longest}: "
            f"set max_length = {window} or less."
        )


def _start_event(recipe: Recipe, loaded: LoadedBase, inputs: Inputs, start: Adapter | None) -> RunStart:
    return RunStart(
        base_id=loaded.ref.id,
        base_revision=loaded.ref.revision,
        base_fingerprint=str(loaded.ref.fingerprint),
        quantization=loaded.quantization,
        recipe_sha256=hashlib.sha256(recipe.to_toml().encode()).hexdigest(),
        data_sha256=inputs.objective.digest,
        samples=inputs.objective.num_samples,
        seed=recipe.seed,
        stop=list(inputs.stop),
        start_digest=start.digest if start else None,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS_OF}},
    )


def _say_model(model: Any, choices: Sequence[Choice], progress: Progress) -> None:
    for choice in choices:
        progress.say(str(choice))
    progress.say(f"{sum(parameter.numel() for parameter in trainable(model)):,} trainable parameters")


def _divide(model: Any, world: World, progress: Progress) -> None:
    """The base among the processes, when it is to be divided."""
    if world.size == 1:
        return
    whole = held_bytes(model)
    shard_base(model, world)
    held = held_bytes(model)
    progress.say(f"{world.size} processes; of the base's {whole / 1e6:.1f} MB each holds {held / 1e6:.1f} MB")


def _peak_bytes(model: Any) -> int:
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    return peak_memory_bytes()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
