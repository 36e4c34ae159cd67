"""Run optimizer steps with evaluation, early stopping and checkpoints."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapterhub.adapter import StoredBase
from adapterhub.errors import TrainingFailed, TrainingStopped
from adapterhub.package.run_record import RunMeasured, RunSampled, RunStep, SampleAnswer
from train.data.tokenization import Sample
from train.distributed.world import current_world
from train.loop.optimizer import load_optimizer, save_optimizer, set_learning_rate
from train.loop.progress import Progress
from train.loop.run_folder import RunFolder, State
from train.loop.schedule import learning_rate_at, step_batches
from train.loop.stopping import StopRequest
from train.model.lora import trainable
from train.model.methods import load_trained, save_trained
from train.objectives.base import EvalResult, Objective
from train.objectives.sample_answers import FixedPrompts

_ADAPTER = "adapter"
"""Folder of a checkpoint that holds the adapter; `pack` accepts it."""


class TrainingLoop:
    """Run optimizer steps with evaluation, early stopping and checkpoints."""

    def __init__(
        self, run: RunFolder, model: Any, optimizer: torch.optim.Optimizer, objective: Objective, base: StoredBase,
        progress: Progress, prompts: FixedPrompts,
    ) -> None:  # fmt: skip
        self._run, self._model, self._optimizer = run, model, optimizer
        self._objective, self._base, self._progress, self._prompts = objective, base, progress, prompts
        self._train = run.recipe.train
        self._total = self._train.num_steps(objective.num_samples)
        self._world = current_world()

    def restore(self) -> State:
        """Load the last checkpoint into model and optimizer; return its state, or that of a new run."""
        newest = self._run.newest
        if newest is None:
            return State()
        load_trained(self._model, newest.path / _ADAPTER)
        load_optimizer(self._optimizer, newest.path)
        self._progress.say(f"resuming after step {newest.state.step} of {self._total}")
        return newest.state

    def run(self, state: State, stop: StopRequest) -> State:
        """Run the steps after `state` and return the last state.

        Samples, learning rate and dropout of a step depend on the recipe and on its number only. Raises
        TrainingStopped when `stop` is set, and TrainingFailed for non-finite numbers.
        """
        self._model.train()
        batches = step_batches(self._objective.lengths(), train=self._train, seed=self._run.recipe.seed)
        for number, places in enumerate(batches, start=1):
            if number <= state.step:
                continue
            if self._train.patience and state.num_worse >= self._train.patience:
                self._progress.say(f"early stopping: no held-out loss below that of step {state.best_step}")
                break
            self._stop_if_asked(stop, state)
            done = self._step(number, places, state)
            self._run.log(done)
            self._progress.step(done, of=self._total)
            state = self._evaluate(state.model_copy(update={"step": number}))
            if self._train.sample_every and number % self._train.sample_every == 0:
                log_answers(self._run, number, self._prompts.answer(self._model))
            if self._train.checkpoint_every and number % self._train.checkpoint_every == 0:
                self._save(state)
        if not self._has_finite_weights():
            self._recover_best(state)
        # A checkpoint first: if writing the adapter fails, no step is lost.
        self._save(state)
        self._stop_if_asked(stop, state)
        return state

    def _step(self, number: int, places: Sequence[Sequence[int]], state: State) -> RunStep:
        """Run one optimizer step. Raises TrainingFailed for a non-finite loss or gradient, before weights change."""
        started = time.perf_counter()
        torch.manual_seed(_seed_of_step(self._run.recipe.seed, number) + self._world.rank)
        rate = learning_rate_at(number, of=self._total, train=self._train)
        set_learning_rate(self._optimizer, rate)
        own = self._world.share(places)
        weight = self._num_trained(own) if self._world.has_own(places) else 0
        parameters = trainable(self._model)
        loss = self._objective.backward(self._model, own)
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

    def _evaluate(self, state: State) -> State:
        every = self._train.evaluate_every
        if not every or state.step % every:
            return state
        result = evaluate_together(self._objective, self._model)
        if not result.tokens:
            return state
        if not result.is_finite:
            self._progress.say(f"step {state.step}: held-out loss {result.loss}: counts as no improvement")
            return state.model_copy(update={"num_worse": state.num_worse + 1})
        self._run.log(RunMeasured(step=state.step, loss=result.loss))
        self._progress.say(f"step {state.step}: held-out loss {result.loss:.3f}")
        if state.best_loss is not None and result.loss >= state.best_loss:
            return state.model_copy(update={"num_worse": state.num_worse + 1})
        if self._train.keep == "best":
            self._run.save_best(state.step, lambda folder: save_trained(self._model, folder, base=self._base.ref))
        return state.model_copy(update={"best_loss": result.loss, "best_step": state.step, "num_worse": 0})

    def final_result(self, state: State) -> EvalResult:
        """Evaluate the weights to keep: the last, or the best when the recipe keeps those (loads them)."""
        after = evaluate_together(self._objective, self._model)
        is_best = after.is_finite and (state.best_loss is None or after.loss <= state.best_loss)
        if is_best or self._train.keep == "last" or state.best_loss is None:
            return after
        self._load_best(state)
        return evaluate_together(self._objective, self._model)

    def _has_finite_weights(self) -> bool:
        is_finite = all(bool(parameter.isfinite().all()) for parameter in trainable(self._model))
        return bool(self._world.from_first([is_finite])[0])

    def _recover_best(self, state: State) -> None:
        if self._train.keep == "last" or state.best_loss is None:
            raise TrainingFailed(
                f"weights contain NaN or Inf after step {state.step}: expected finite numbers. {_advice(self._run)}"
            )
        self._load_best(state)

    def _load_best(self, state: State) -> None:
        load_trained(self._model, self._run.best_at(state.best_step))
        self._progress.say(f"keeping the weights of step {state.best_step}, which have the lowest held-out loss")

    def _save(self, state: State) -> None:
        """Write a checkpoint, unless weights contain NaN or Inf: then keep the last good one."""
        if not self._has_finite_weights():
            return

        def write(folder: Path) -> None:
            (folder / _ADAPTER).mkdir()
            save_trained(self._model, folder / _ADAPTER, base=self._base.ref)
            save_optimizer(self._optimizer, folder)

        self._run.save(state, write)

    def _stop_if_asked(self, stop: StopRequest, state: State) -> None:
        if not self._world.any(stop.is_set):
            return
        if state.step:
            self._save(state)
        newest = self._run.newest
        if newest is None:
            raise TrainingStopped(
                f"stopped after step {state.step} of {self._total}: there is no checkpoint. Start the run again."
            )
        kept = "" if newest.state.step == state.step else f" with a checkpoint of step {newest.state.step}"
        raise TrainingStopped(
            f"stopped after step {state.step} of {self._total}{kept}: resume with `adapterhub train --resume "
            f"{self._run.output}`."
        )

    def _fail(self, number: int, loss: float, norm: float, state: State) -> None:
        if state.step:
            self._save(state)
        raise TrainingFailed(
            f"loss {loss} and gradient norm {norm} at step {number} of {self._total}: expected finite numbers. "
            f"{_advice(self._run)}"
        )


def evaluate_together(objective: Objective, model: Any) -> EvalResult:
    """Evaluate the model in every process, and return the first one's losses in all of them."""
    own = objective.evaluate(model)
    loss, nats_per_token = current_world().from_first([own.loss, own.nats_per_token])
    return replace(own, loss=loss, nats_per_token=nats_per_token)


def log_answers(run: RunFolder, step: int, answers: list[SampleAnswer]) -> None:
    if answers:
        run.log(RunSampled(step=step, answers=answers))


def check_finite_loss(run: RunFolder, what: str, result: EvalResult) -> None:
    """Check that the held-out loss of trained weights is finite. Raises TrainingFailed."""
    if not result.is_finite:
        raise TrainingFailed(f"held-out loss of {what} is {result.loss}: expected a finite number. {_advice(run)}")


def check_base_loss(result: EvalResult) -> None:
    """Check that the base without an adapter has a finite loss, which no learning rate affects.

    Raises TrainingFailed.
    """
    if not result.is_finite:
        raise TrainingFailed(
            f"held-out loss of the base is {result.loss}: expected a finite number. Set compute_dtype to float32."
        )


def _advice(run: RunFolder) -> str:
    """Return what to do about non-finite numbers, and the path of the last checkpoint."""
    newest, kept = run.newest, ""
    if newest is not None:
        kept = f" The adapter of step {newest.state.step} is kept in {newest.path / _ADAPTER}"
    rate = run.recipe.train.learning_rate
    return f"Lower learning_rate (now {rate:g}), or set compute_dtype to float32.{kept}"


def _seed_of_step(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big") >> 1
