"""Train an adapter: from a recipe and a base to an adapter folder, in numbered steps."""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.loading import LoadedBase, load_base
from adapterhub.bases.positions import why_too_long
from adapterhub.chat_template import chat_date
from adapterhub.choice import Choice
from adapterhub.errors import DatasetError, OutputNotFresh, RunNotResumable, UsageError
from adapterhub.files import new_folder
from adapterhub.memory.estimate import Estimate
from adapterhub.package.layout import TEMPLATE_NAME, open_adapter
from adapterhub.package.run_record import LOG_NAME, RECIPE_NAME, REPORT_NAME, RunEnd, RunStart, RunStep
from adapterhub.units import format_bytes
from train.distributed.world import World, current_world, frozen_bytes, shard_base
from train.inputs import Inputs, load_inputs, with_lora_of
from train.loop.lora_init import init_lora
from train.loop.optimizer import make_optimizer, undecayed_parameters
from train.loop.progress import Progress, peak_memory_bytes, progress_on
from train.loop.run_folder import Listener, RunFolder, check_fresh
from train.loop.steps import TrainingLoop, check_base_loss, check_finite_loss, evaluate_together, log_answers
from train.loop.stopping import stop_requests
from train.model.fused_lora import fuse_lora
from train.model.lora import continue_lora, lora_b_parameters, trainable
from train.model.methods import adapter_disabled, attach, configure_forward, save_trained
from train.model.self_check import check_rows
from train.objectives.base import EvalResult, Objective
from train.objectives.forward import row_support
from train.objectives.mask_report import mask_report
from train.objectives.sample_answers import FixedPrompts
from train.planning.out_of_memory import memory_errors_named
from train.planning.plan import planned_memory
from train.planning.preflight import check_room
from train.recipe import Recipe
from train.reporting.html_report import report

_VERSIONS_OF = ("adapterhub", "torch", "transformers", "peft", "bitsandbytes")


def train(
    recipe: Recipe, base: StoredBase, output: Path, *, start: Adapter | None = None, progress: Progress | None = None,
    listen: Listener | None = None,
) -> RunEnd:  # fmt: skip
    """Train the recipe's adapter into `output`, a folder that is new or empty.

    Training starts from the adapter `start`, or from a new adapter. `output` appears only when the run is complete.
    Until then the run works in a folder beside it (loop/run_folder.py) and can be stopped and resumed. The same
    recipe, seed, machine and thread count give the same bytes, also for a run that was resumed. Sets torch's global
    seed. `progress` defaults to output on stderr; `listen` is called with each event of the run record.

    Raises OutputNotFresh, RecipeError, DatasetError, BaseNotFound, IncompatibleBase, UsageError, StorageFull,
    TrainingStopped after SIGINT or SIGTERM, and TrainingFailed for a non-finite loss or when memory runs out.
    """
    progress = progress or progress_on(sys.stderr)
    try:
        check_fresh(output)
        recipe = with_lora_of(recipe, start)
        # 1. The data, before anything expensive.
        inputs = _load(recipe, base, start, progress)
        memory = planned_memory(recipe, base, inputs.objective)
        with RunFolder.create(output, recipe, start=start) as run, memory_errors_named(memory.device):
            run.listen = listen
            return _train_in(run, base, inputs, start, memory, progress)
    finally:
        progress.close()


def resume(
    output: Path, base: StoredBase, *, progress: Progress | None = None, listen: Listener | None = None
) -> RunEnd:
    """Resume the stopped run of `output` from its last checkpoint.

    Raises what `train` raises, and RunNotResumable when there is no such run, or when the data, the base or the start
    adapter has changed since the run began.
    """
    progress = progress or progress_on(sys.stderr)
    try:
        with RunFolder.reopen(output) as run:
            if (end := run.finished()) is not None:
                run.remove()
                return end
            check_fresh(output)
            start = open_adapter(run.start) if run.start else None
            inputs = _load(run.recipe, base, start, progress, date=_begun_on(run))
            run.listen = listen
            memory = planned_memory(run.recipe, base, inputs.objective)
            with memory_errors_named(memory.device):
                return _train_in(run, base, inputs, start, memory, progress)
    finally:
        progress.close()


def _begun_on(run: RunFolder) -> date | None:
    """Return the date that the chat template of a stopped run rendered, None for a run without a checkpoint."""
    began = next(iter(run.events()), None)
    if not isinstance(began, RunStart):
        return None
    # Version 0.1.0 recorded no date: a template that reads the clock rendered that of the moment.
    return date.fromisoformat(began.date) if began.date else run.created_on


def _load(
    recipe: Recipe, base: StoredBase, start: Adapter | None, progress: Progress, *, date: date | None = None
) -> Inputs:
    inputs = load_inputs(recipe, base, start=start, date=date)
    objective, world = inputs.objective, current_world()
    for what, digest in (
        ("the recipe", recipe.to_toml()),
        ("the data", objective.digest),
        ("the start adapter", start.digest if start else None),
    ):
        world.check_alike(what, digest)
    progress.say(f"{objective.describe()}; {recipe.train.num_steps(objective.num_samples)} steps")
    report = mask_report(objective, inputs.tokenizer)
    progress.say(f"masks: {report.summary}")
    report.check()
    for note in (*inputs.notes, *report.notes):
        progress.say(f"note: {note}")
    return inputs


def _train_in(
    run: RunFolder, base: StoredBase, inputs: Inputs, start: Adapter | None, memory: Estimate,
    progress: Progress,
) -> RunEnd:  # fmt: skip
    recipe, objective = run.recipe, inputs.objective
    # 2. The quantized base, and on it the adapter: drawn from the seed, or the one that training starts from.
    torch.manual_seed(recipe.seed)
    world = current_world()
    arguments = {"device": world.device, "tokenizer": inputs.tokenizer} | recipe.base_arguments()
    loaded = load_base(base, purpose="train", **arguments)
    world.check_alike("the base", str(loaded.ref.fingerprint))
    _check_positions(loaded.model, recipe, objective)
    if start is None:
        model = attach(loaded.model, recipe)
        init_lora(model, recipe.lora, base=base.path, objective=objective)
    else:
        model = configure_forward(continue_lora(loaded.model, start, dropout=recipe.lora.dropout), recipe)
    fuse_lora(model)
    for line in check_rows(model, recipe, loaded.ref.fingerprint, _some_tokens(objective)):
        progress.say(line)
    _check_sharding(model, world, objective)
    faster, undecayed = lora_b_parameters(model), undecayed_parameters(model)
    optimizer, chosen = make_optimizer(trainable(model), recipe.train, lora_b_parameters=faster, undecayed=undecayed)
    check_room(run.output, trainable(model), recipe)
    _report_model(model, (*loaded.choices, chosen), progress)
    _shard(model, world, progress)

    # 3. The run record: a new one, or that of the last checkpoint.
    _open_record(run, _start_event(recipe, loaded, inputs, start))
    texts = recipe.train.prompts if recipe.train.sample_every else ()
    with chat_date(inputs.date):
        prompts = FixedPrompts(texts, loaded.tokenizer, stop=inputs.stop)

    # 4. Held-out loss of the base, and of what training starts from.
    objective.set_reference(model)
    with adapter_disabled(model):
        base_result = evaluate_together(objective, model)
        if run.newest is None:
            log_answers(run, 0, prompts.answer(model))
    # Only preference tuning reports the start apart from the base.
    starts_elsewhere = start or recipe.lora.init == "loftq" or recipe.method in ("prompt", "prefix")
    before = evaluate_together(objective, model) if recipe.preference and starts_elsewhere else base_result
    _check_has_held_out(recipe, base_result)
    check_base_loss(base_result)
    check_finite_loss(run, "the start adapter", before)

    # 5. The steps.
    loop = TrainingLoop(run, model, optimizer, objective, base, progress, prompts)
    with stop_requests() as stop:
        state = loop.run(loop.restore(), stop)

    # 6. Held-out loss of the result, and the output folder.
    after = loop.final_result(state)
    check_finite_loss(run, "the trained adapter", after)
    events = run.events()
    steps = [event for event in events if isinstance(event, RunStep)]
    end = RunEnd(
        steps=state.step,
        trained_tokens=sum(step.trained_tokens for step in steps),
        seconds=round(sum(step.seconds for step in steps), 3),
        peak_memory_bytes=_peak_bytes(model),
        evaluations=objective.evaluations(base=base_result, before=before, after=after),
        answers=prompts.answer(model),
    )
    run.log(end)
    _write_adapter_folder(run, model, loaded, report(recipe, [*events, end], memory, objective, loaded))
    return end


def _write_adapter_folder(run: RunFolder, model: Any, loaded: LoadedBase, page: str) -> None:
    """Write the output folder atomically, then remove the run's own folder."""
    with new_folder(run.output) as folder:
        written = folder.stat().st_ino
        save_trained(model, folder, base=loaded.ref, tokenizer=loaded.tokenizer)
        (folder / TEMPLATE_NAME).write_text(loaded.tokenizer.get_chat_template(), encoding="utf-8")
        (folder / REPORT_NAME).write_text(page, encoding="utf-8")
        for name in (RECIPE_NAME, LOG_NAME):
            shutil.copyfile(run.path / name, folder / name)
    # `new_folder` keeps a folder that appeared in the meantime; the result of a long run must not be lost silently.
    if not run.output.is_dir() or run.output.stat().st_ino != written:
        raise OutputNotFresh(
            f"another process created {run.output} during the run: expected it to stay absent. Move it away, then run "
            f"`adapterhub train --resume {run.output}` to write this adapter."
        )
    run.remove()


def _open_record(run: RunFolder, start: RunStart) -> None:
    events = run.events()
    if not events:
        run.log(start)
        return
    began = events[0]
    if not isinstance(began, RunStart):
        raise RunNotResumable(
            f"{run.path / LOG_NAME} does not begin with the start of a run: the file was changed. Train again into a "
            "new folder."
        )
    for what, then, now in (
        ("the data", began.data_sha256, start.data_sha256),
        ("the base", began.base_fingerprint, start.base_fingerprint),
        ("the start adapter", began.start_digest, start.start_digest),
    ):
        if then != now:
            raise RunNotResumable(
                f"{what} of {run.output} changed since the run began: expected {then}, found {now}. Restore it"
                f"{_other_versions(began, start)}, or train again into a new folder."
            )


def _other_versions(began: RunStart, now: RunStart) -> str:
    """Return the versions that a run began with, where they are others now and may read the same files otherwise."""
    others = [f"{name} {then}" for name, then in began.versions.items() if now.versions.get(name) != then]
    return f" (the run began with {', '.join(others)})" if others else ""


def _some_tokens(objective: Objective) -> list[int]:
    """Return tokens of the first samples, for the check of rows."""
    samples = (sample for place in range(min(4, objective.num_samples)) for sample in objective.samples_at(place))
    return [token for sample in samples for token in sample.tokens[-16:]]


def _check_has_held_out(recipe: Recipe, base_result: EvalResult) -> None:
    if not base_result.tokens and (recipe.train.keep == "best" or recipe.train.patience):
        raise DatasetError(
            'the split left no held-out samples: keep = "best" and patience need some. Raise held_out in [data].'
        )


def _check_positions(model: Any, recipe: Recipe, objective: Objective) -> None:
    """Check that the base has a position for every token of the longest sample. Raises UsageError."""
    before = recipe.virtual_tokens if recipe.method in ("prompt", "prefix") else 0
    if reason := why_too_long(model, before + objective.longest):
        virtual = f" and {before} virtual ones before them" if before else ""
        raise UsageError(
            f"the longest sample has {objective.longest} tokens{virtual}: {reason}. Set max_length in [data] to fewer."
        )


def _check_sharding(model: Any, world: World, objective: Objective) -> None:
    """Check that processes that share a base make equally many forward passes. Raises UsageError."""
    support = row_support(model)
    is_split = support.mode != "batched" or (support.longest is not None and objective.longest > support.longest)
    if world.shards and is_split:
        raise UsageError(
            f"the base is trained one sample a row ({support.reason or 'of those that are long'}): expected packed "
            "rows, whose number is the same in each process that holds a part of the base. Leave out --shard."
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
        date=inputs.date.isoformat() if inputs.date else None,
        start_digest=start.digest if start else None,
        versions={"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS_OF}},
    )


def _report_model(model: Any, choices: Sequence[Choice], progress: Progress) -> None:
    for choice in choices:
        progress.say(str(choice))
    progress.say(f"{sum(parameter.numel() for parameter in trainable(model)):,} trainable parameters")


def _shard(model: Any, world: World, progress: Progress) -> None:
    """Shard the base among the processes, where the run asks for it."""
    if world.size == 1:
        return
    whole = frozen_bytes(model)
    shard_base(model, world)
    part = frozen_bytes(model)
    progress.say(f"{world.size} processes; of the base's {format_bytes(whole)} each holds {format_bytes(part)}")


def _peak_bytes(model: Any) -> int:
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    return peak_memory_bytes()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
