"""Non-finite losses and weights: the messages, the checkpoints that are kept, and resuming from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from stopped_runs import StopAfter, losses, recipe_of, resume_run
from training import WEIGHTS, run

from adapterhub.adapter import StoredBase
from adapterhub.errors import TrainingFailed, TrainingStopped
from adapterhub.files import sha256_of
from adapterhub.package.run_record import read_run_record
from train.loop import steps
from train.loop.run_folder import run_path
from train.objectives import sft

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Paged optimizers are not supported on CPU"
)


def nan_learning_rate_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the weights NaN after a step."""
    sound = steps.learning_rate_at
    monkeypatch.setattr(
        steps, "learning_rate_at", lambda step, **rest: float("nan") if step == number else sound(step, **rest)
    )


def test_a_nan_loss_keeps_the_step_before(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe_of(tmp_path, steps=4, schedule="constant"), tiny_base, tmp_path / "four")
    sound, calls = sft.row_loss, iter(range(1, 7))
    monkeypatch.setattr(
        sft, "row_loss", lambda *arguments: sound(*arguments) * (float("nan") if next(calls) == 5 else 1.0)
    )
    with pytest.raises(TrainingFailed) as caught:
        run(recipe_of(tmp_path, schedule="constant", checkpoint_every=0), tiny_base, tmp_path / "out")
    kept = run_path(tmp_path / "out") / "step-000004" / "adapter"
    assert "loss nan and gradient norm nan at step 5 of 6" in str(caught.value)
    assert f"The adapter of step 4 is kept in {kept}" in str(caught.value)
    assert sha256_of(kept / WEIGHTS) == sha256_of(tmp_path / "four" / WEIGHTS)


def test_nan_weights_replace_no_checkpoint(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_learning_rate_at(4, monkeypatch)
    with pytest.raises(TrainingFailed, match="loss nan and .* at step 5 of 6.*adapter of step 2 is kept"):
        run(recipe_of(tmp_path), tiny_base, tmp_path / "out")
    assert [path.name for path in run_path(tmp_path / "out").glob("step-*")] == ["step-000002"]


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_nan_held_out_loss_leaves_a_run_that_can_be_resumed(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    recipe = recipe_of(tmp_path, evaluate_every=1, keep=keep, checkpoint_every=1)
    run(recipe, tiny_base, tmp_path / "whole")
    sound, calls = steps.set_learning_rate, iter(range(1, 7))
    with monkeypatch.context() as patched:
        patched.setattr(
            steps, "set_learning_rate", lambda adam, rate: sound(adam, float("nan") if next(calls) == 4 else rate)
        )
        with pytest.raises(TrainingFailed) as caught:
            run(recipe, tiny_base, tmp_path / "out")
    assert f"The adapter of step 3 is kept in {run_path(tmp_path / 'out') / 'step-000003' / 'adapter'}" in str(
        caught.value
    )
    resume_run(tmp_path / "out", tiny_base)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert sha256_of(tmp_path / "whole" / WEIGHTS) == sha256_of(tmp_path / "out" / WEIGHTS)


def test_the_best_weights_are_kept_when_the_last_are_nan(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = iter([3.0, 2.0, 1.0, float("nan"), float("nan"), 1.0])  # bare, three steps, the last, the best
    monkeypatch.setattr("train.objectives.sft.held_out_loss", lambda model, samples: (next(measures), 4))
    end = run(recipe_of(tmp_path, steps=3, evaluate_every=1, keep="best"), tiny_base, tmp_path / "out")
    assert losses(tmp_path / "out") == [2.0, 1.0]
    assert (end.evaluations[0].base_loss, end.evaluations[0].adapter_loss) == (3.0, 1.0)
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert [step.step for step in record.steps] == [1, 2, 3]


@pytest.mark.parametrize("keep", ["last", "best"])
def test_one_non_finite_held_out_loss_costs_no_step(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    run(recipe_of(tmp_path, evaluate_every=0), tiny_base, tmp_path / "unmeasured")
    measures = iter([3.0, float("inf"), 2.0, 1.0])  # bare, steps 3 and 6, the result
    monkeypatch.setattr("train.objectives.sft.held_out_loss", lambda model, samples: (next(measures), 4))
    run(recipe_of(tmp_path, evaluate_every=3, keep=keep), tiny_base, tmp_path / "out")
    assert losses(tmp_path / "out") == [2.0]
    assert sha256_of(tmp_path / "unmeasured" / WEIGHTS) == sha256_of(tmp_path / "out" / WEIGHTS)


def test_stopping_a_run_with_nan_weights_names_the_checkpoint(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_learning_rate_at(3, monkeypatch)
    for every, said in (
        (2, "stopped after step 3 of 6 with a checkpoint of step 2: resume with"),
        (0, "3 of 6: there is no checkpoint."),
    ):
        with pytest.raises(TrainingStopped, match=said):
            run(recipe_of(tmp_path, checkpoint_every=every), tiny_base, tmp_path / f"out{every}", progress=StopAfter(3))


def test_nan_held_out_losses_count_for_early_stopping(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = iter([3.0, 2.0, float("nan"), float("nan"), 2.0])
    monkeypatch.setattr("train.objectives.sft.held_out_loss", lambda model, samples: (next(measures), 4))
    recipe = recipe_of(tmp_path, evaluate_every=1, keep="best", patience=2)
    assert run(recipe, tiny_base, tmp_path / "out").steps == 3


@pytest.mark.parametrize(
    ("measures", "what"),
    [
        ([float("nan")], "the base is nan: expected a finite number. Set compute_dtype"),
        ([3.0, float("inf")], "the trained adapter is inf: expected a finite number. Lower learning_rate"),
    ],
)
def test_a_non_finite_held_out_loss_before_or_after_the_run(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, measures: list[float], what: str
) -> None:
    given = iter(measures)
    with monkeypatch.context() as patched:
        patched.setattr("train.objectives.sft.held_out_loss", lambda model, samples: (next(given), 4))
        with pytest.raises(TrainingFailed, match=f"held-out loss of {what}"):
            run(recipe_of(tmp_path), tiny_base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run_path(tmp_path / "out").exists() == (len(measures) > 1)
    if len(measures) > 1:
        resume_run(tmp_path / "out", tiny_base)


def test_nan_weights_after_the_last_step(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_learning_rate_at(6, monkeypatch)
    with pytest.raises(TrainingFailed, match="weights contain NaN or Inf after step 6.*adapter of step 4 is kept"):
        run(recipe_of(tmp_path), tiny_base, tmp_path / "out")
