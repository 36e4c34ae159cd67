"""The training run, from a recipe and a base to an adapter folder, in numbered paragraphs. Publishes nothing."""

from __future__ import annotations

import hashlib
import math
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adapterhub.adapter import Adapter
from adapterhub.base_model import Choice, LoadedBase, load_base
from adapterhub.base_store import StoredBase
from adapterhub.errors import (
    DatasetError,
    OutputNotFresh,
    RunNotResumable,
    TrainingFailed,
    TrainingStopped,
    UsageError,
)
from adapterhub.files import new_folder
from adapterhub.package import TEMPLATE_NAME, open_adapter
from adapterhub.run_record import (
    LOG_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    Answer,
    RunEnd,
    RunMeasured,
    RunSampled,
    RunStart,
    RunStep,
)
from train.answering import FixedPrompts
from train.data import Sample
from train.distributed import World, current_world, held_bytes, shard_base
from train.fused_lora import fuse_lora
from train.inputs import Inputs, load_inputs, with_lora_of
from train.lora import continue_lora, second_factors, trainable
from train.lora_start import start_lora
from train.mask_report import mask_report
from train.methods import load_trained, put_on, save_trained, with_options, without_change
from train.objective import Measured, Objective
from train.optimizer import load_optimizer, make_optimizer, save_optimizer, set_rate
from train.out_of_memory import memory_errors_named
from train.plan import MemoryItem, planned_memory
from train.preflight import check_room
from train.progress import Progress, peak_memory_bytes, progress_on
from train.recipe import Recipe
from train.report import report
from train.run_folder import Listener, RunFolder, State, check_fresh
from train.schedule import learning_rate_at, step_batches
from train.stopping import StopWish, stop_wishes

_VERSIONS_OF = ("adapterhub", "torch", "transformers", "peft", "bitsandbytes")
_ADAPTER = "adapter"
"""folder of a checkpoint that holds the adapter, which `pack` takes"""


def fit(
    recipe: Recipe, base: StoredBase, output: Path, *, start: Adapter | None = None, progress: Progress | None = None,
    listen: Listener | None = None,
) -> RunEnd:  # fmt: skip
    """Train the recipe's adapter, a new one or going on from `start`, into `output`, a folder that is new or empty.

    `output` appears only when complete; until then the run lives in a folder beside it (train/run_folder.py) and can
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
    loaded = load_base(base, purpose="train", device=world.device, **recipe.base_arguments())
    loaded.tokenizer.chat_template = inputs.tokenizer.chat_template
    _check_window(loaded, objective)
    if start is None:
        model = put_on(loaded.model, recipe)
        start_lora(model, recipe.lora, base=base.path, objective=objective)
    else:
        model = with_options(continue_lora(loaded.model, start, dropout=recipe.lora.dropout), recipe)
    fuse_lora(model)
    optimizer, chosen = make_optimizer(trainable(model), recipe.train, second_factors=second_factors(model))
    check_room(run.output, trainable(model), recipe)
    _say_model(model, (*loaded.choices, chosen), progress)
    _divide(model, world, progress)

    # 3. The record opens, or goes on where the newest checkpoint left it.
    _open_record(run, _start_event(recipe, loaded, inputs, start))
    asked = recipe.train.prompts if recipe.train.sample_every else ()
    prompts = FixedPrompts(asked, loaded.tokenizer, stop=inputs.stop)

    # 4. What the bare base and the start make of the held-out questions.
    objective.refer_to(model)
    with without_change(model):
        bare = objective.measure(model)
        if run.newest is None:
            _log_answers(run, 0, prompts.answer(model))
    # Only preference tuning tells what training started from apart from the bare base.
    is_other = start or recipe.lora.init == "loftq" or recipe.method in ("prompt", "prefix")
    before = objective.measure(model) if recipe.preference and is_other else bare
    _check_measures(recipe, bare)
    for what, measured in (("the bare base", bare), ("the adapter that training starts from", before)):
        _check_finite(run, what, measured)

    # 5. The steps.
    course = _Course(run, model, optimizer, objective, base, progress, prompts)
    with stop_wishes() as wish:
        state = course.steps(course.restored(), wish)

    # 6. The same questions again, and the folder.
    after = _settle(run, model, objective, state, progress)
    _check_finite(run, "the trained adapter", after)
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


class _Course:
    """The steps of one run: what they work on, and how they are kept."""

    def __init__(
        self, run: RunFolder, model: Any, optimizer: torch.optim.Optimizer, objective: Objective, base: StoredBase,
        progress: Progress, prompts: FixedPrompts,
    ) -> None:  # fmt: skip
        self._run, self._model, self._optimizer = run, model, optimizer
        self._objective, self._base, self._progress, self._prompts = objective, base, progress, prompts
        self._train = run.recipe.train
        self._total = self._train.num_steps(objective.num_samples)
        self._world = current_world()
        self._is_lost = False
        """Was the newest held-out loss no number?"""

    def restored(self) -> State:
        """Model and optimizer as the newest checkpoint has them. The start of the run, when there is none."""
        newest = self._run.newest
        if newest is None:
            return State()
        load_trained(self._model, newest.path / _ADAPTER)
        load_optimizer(self._optimizer, newest.path)
        self._progress.say(f"going on after step {newest.state.step} of {self._total}")
        return newest.state

    def steps(self, state: State, wish: StopWish) -> State:
        """Take the steps after `state`; each draws its order, rate and dropout from its number alone."""
        self._model.train()
        batches = step_batches(self._objective.lengths(), train=self._train, seed=self._run.recipe.seed)
        for number, places in enumerate(batches, start=1):
            if number <= state.step:
                continue
            if self._train.patience and state.num_worse >= self._train.patience:
                self._progress.say(f"stopped early: no lower held-out loss than that of step {state.best_step}")
                break
            if self._world.any(wish.is_made):
                self._stop(state)
            done = self._step(number, places, state)
            self._run.log(done)
            self._progress.step(done, of=self._total)
            state = self._measured(state.model_copy(update={"step": number}))
            if self._train.sample_every and number % self._train.sample_every == 0:
                _log_answers(self._run, number, self._prompts.answer(self._model))
            if self._train.checkpoint_every and number % self._train.checkpoint_every == 0:
                self._save(state)
        if not self._is_sound():
            self._back_to_best(state)
        # Whatever writing the adapter meets, the steps are not lost.
        self._save(state)
        return state

    def _step(self, number: int, places: Sequence[Sequence[int]], state: State) -> RunStep:
        """Raises TrainingFailed when loss or gradient is no number; the weights then are still those of `state`."""
        started = time.perf_counter()
        torch.manual_seed(_seed_of_step(self._run.recipe.seed, number) + self._world.rank)
        rate = learning_rate_at(number, of=self._total, train=self._train)
        set_rate(self._optimizer, rate)
        mine = self._world.share(places)
        weight = self._num_trained(mine) if self._world.has_own(places) else 0
        parameters = trainable(self._model)
        loss = self._objective.backward(self._model, mine)
        loss = self._world.sum_gradients(parameters, loss, weight=weight)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._train.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._fail(number, loss, norm, state)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return RunStep(
            step=number,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(sample.tokens) for sample in self._samples(places)),
            trained_tokens=self._num_trained(places),
            seconds=round(time.perf_counter() - started, 4),
        )

    def _samples(self, places: Sequence[Sequence[int]]) -> list[Sample]:
        return [sample for row in places for place in row for sample in self._objective.samples_at(place)]

    def _num_trained(self, places: Sequence[Sequence[int]]) -> int:
        return sum(sample.num_trained for sample in self._samples(places))

    def _measured(self, state: State) -> State:
        every = self._train.evaluate_every
        if not every or state.step % every:
            return state
        measured = self._objective.measure(self._model)
        if not measured.tokens:
            return state
        self._is_lost = not measured.is_finite
        if self._is_lost:
            self._progress.say(f"step {state.step}: the held-out loss is {measured.loss}: it counts as a worse one")
            return state.model_copy(update={"num_worse": state.num_worse + 1})
        self._run.log(RunMeasured(step=state.step, loss=measured.loss))
        self._progress.say(f"step {state.step}: held-out loss {measured.loss:.3f}")
        if state.best_loss is not None and measured.loss >= state.best_loss:
            return state.model_copy(update={"num_worse": state.num_worse + 1})
        if self._train.keep == "best":
            self._run.save_best(state.step, lambda folder: save_trained(self._model, folder, base=self._base.ref))
        return state.model_copy(update={"best_loss": measured.loss, "best_step": state.step, "num_worse": 0})

    def _is_sound(self) -> bool:
        return not self._is_lost and all(bool(p.isfinite().all()) for p in trainable(self._model))

    def _back_to_best(self, state: State) -> None:
        if self._train.keep == "last" or state.best_loss is None:
            raise TrainingFailed(
                f"after step {state.step} the weights or the held-out loss are no numbers: {_advice(self._run)}"
            )
        load_trained(self._model, self._run.best_at(state.best_step))
        self._is_lost = False
        self._progress.say(f"kept: the weights of step {state.best_step}, with the lowest held-out loss")

    def _save(self, state: State) -> None:
        """A checkpoint, unless weights or held-out loss are no numbers: an older one is then the last that is good."""
        if not self._is_sound():
            return

        def write(folder: Path) -> None:
            (folder / _ADAPTER).mkdir()
            save_trained(self._model, folder / _ADAPTER, base=self._base.ref)
            save_optimizer(self._optimizer, folder)

        self._run.save(state, write)

    def _stop(self, state: State) -> None:
        if state.step:
            self._save(state)
        raise TrainingStopped(
            f"stopped after step {state.step} of {self._total}: go on with `adapterhub train --resume "
            f"{self._run.output}`."
            if state.step
            else "stopped before the first step; nothing was kept."
        )

    def _fail(self, number: int, loss: float, norm: float, state: State) -> None:
        if state.step:
            self._save(state)
        raise TrainingFailed(
            f"at step {number} of {self._total} the loss is {loss} and the gradient norm {norm}: {_advice(self._run)}"
        )


def _settle(run: RunFolder, model: Any, objective: Objective, state: State, progress: Progress) -> Measured:
    """The final held-out figures, with the best weights back in the model when the recipe keeps those."""
    after = objective.measure(model)
    if run.recipe.train.keep == "last" or state.best_loss is None or after.loss <= state.best_loss:
        return after
    load_trained(model, run.best_at(state.best_step))
    progress.say(f"kept: the weights of step {state.best_step}, with the lowest held-out loss")
    return objective.measure(model)


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


def _log_answers(run: RunFolder, step: int, answers: list[Answer]) -> None:
    if answers:
        run.log(RunSampled(step=step, answers=answers))


def _check_measures(recipe: Recipe, bare: Measured) -> None:
    if not bare.tokens and (recipe.train.keep == "best" or recipe.train.patience):
        raise DatasetError("keep = best and patience need held-out samples, and the split left none: raise held_out.")


def _check_finite(run: RunFolder, what: str, measured: Measured) -> None:
    if not measured.is_finite:
        raise TrainingFailed(f"the held-out loss of {what} is {measured.loss}: {_advice(run)}")


def _advice(run: RunFolder) -> str:
    """Against losses that are no numbers, and what is kept."""
    newest, kept = run.newest, ""
    if newest is not None:
        kept = f" The adapter as it was after step {newest.state.step} is kept: {newest.path / _ADAPTER}"
    rate = run.recipe.train.learning_rate
    return f"lower learning_rate (now {rate:g}), or set compute_dtype to float32.{kept}"


def _seed_of_step(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big") >> 1


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
