"""Stopped, killed and resumed runs end in the same bytes as runs that were not; what is refused, what is kept."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stopped_runs import StopAfter, losses, recipe_of, resume_run, train_and_stop
from training import WEIGHTS, Interrupt, make_recipe, run

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.errors import OutputNotFresh, RunNotResumable, StorageFull, TrainingStopped
from adapterhub.files import sha256_of
from adapterhub.package.run_record import RunStart, RunStep, read_run_events, read_run_record
from train import inputs, trainer
from train.loop.optimizer import load_optimizer, make_optimizer, save_optimizer
from train.loop.progress import Silent
from train.loop.run_folder import run_path
from train.recipe import Recipe, TrainSection

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Paged optimizers are not supported on CPU"
)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw"])
@pytest.mark.parametrize("after", [1, 4])
def test_stopped_and_resumed_is_the_same_bytes(
    tmp_path: Path, tiny_base: StoredBase, optimizer: str, after: int
) -> None:
    recipe = recipe_of(tmp_path, optimizer=optimizer)
    run(recipe, tiny_base, tmp_path / "whole")
    train_and_stop(recipe, tiny_base, tmp_path / "parts", after=after)
    assert not (tmp_path / "parts").exists()
    resume_run(tmp_path / "parts", tiny_base)
    for name in (WEIGHTS, "adapter_config.json", "recipe.toml"):
        assert sha256_of(tmp_path / "whole" / name) == sha256_of(tmp_path / "parts" / name)
    whole, parts = (read_run_record(tmp_path / name) for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert [(s.step, s.loss, s.learning_rate) for s in whole.steps] == [
        (s.step, s.loss, s.learning_rate) for s in parts.steps
    ]
    assert whole.evaluations == parts.evaluations
    assert whole.training.trained_tokens == parts.training.trained_tokens
    assert not run_path(tmp_path / "parts").exists()


def test_grouped_by_length_under_a_template_file_is_the_same_bytes_too(tmp_path: Path, tiny_base: StoredBase) -> None:
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    train = {"steps": 6, "checkpoint_every": 2, "group_by_length": True, "loss_on": "all"}
    recipe = make_recipe(tmp_path, train=train, data={"template": "mine.jinja"})
    run(recipe, tiny_base, tmp_path / "whole")
    train_and_stop(recipe, tiny_base, tmp_path / "parts", after=3)
    resume_run(tmp_path / "parts", tiny_base)
    for name in (WEIGHTS, "chat_template.jinja", "recipe.toml"):
        assert sha256_of(tmp_path / "whole" / name) == sha256_of(tmp_path / "parts" / name)
    assert (tmp_path / "parts" / "chat_template.jinja").read_text() == (tmp_path / "mine.jinja").read_text()


def test_preference_runs_resume_too(tmp_path: Path, tiny_base: StoredBase) -> None:
    from preference_rows import TRAIN, preference_recipe

    recipe = preference_recipe(tmp_path, "kto", train=TRAIN | {"steps": 4}, lora={"dropout": 0.1})
    run(recipe, tiny_base, tmp_path / "whole")
    train_and_stop(recipe, tiny_base, tmp_path / "parts", after=2)
    resume_run(tmp_path / "parts", tiny_base)
    assert sha256_of(tmp_path / "whole" / WEIGHTS) == sha256_of(tmp_path / "parts" / WEIGHTS)


def test_stopping_says_how_to_resume(tmp_path: Path, tiny_base: StoredBase) -> None:
    with pytest.raises(TrainingStopped) as caught:
        run(recipe_of(tmp_path), tiny_base, tmp_path / "out", progress=StopAfter(3, signal.SIGINT))
    said = str(caught.value)
    assert f"stopped after step 3 of 6: resume with `adapterhub train --resume {tmp_path / 'out'}`" in said
    assert caught.value.exit_code == 130


def test_signals_mean_what_they_did_after_the_run(tmp_path: Path, tiny_base: StoredBase) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(recipe_of(tmp_path), tiny_base, tmp_path / "out")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_checkpoint_holds_no_pickle_and_only_the_newest_stays(tmp_path: Path, tiny_base: StoredBase) -> None:
    train_and_stop(recipe_of(tmp_path), tiny_base, tmp_path / "out", after=5)
    folder = run_path(tmp_path / "out")
    assert [path.name for path in folder.glob("step-*")] == ["step-000005"]
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".toml", ""}


def test_a_stopped_run_is_not_begun_again_by_accident(tmp_path: Path, tiny_base: StoredBase) -> None:
    train_and_stop(recipe_of(tmp_path), tiny_base, tmp_path / "out", after=2)
    with pytest.raises(
        OutputNotFresh, match=r"holds a stopped run: expected none. Resume it with `adapterhub train --resume"
    ):
        run(recipe_of(tmp_path), tiny_base, tmp_path / "out")


def test_a_run_of_another_process_is_not_resumed(tmp_path: Path, tiny_base: StoredBase) -> None:
    class Second(Silent):
        said = ""

        def step(self, done: RunStep, *, of: int) -> None:
            with pytest.raises(OutputNotFresh) as caught:
                resume_run(tmp_path / "out", tiny_base)
            self.said = str(caught.value)

    second = Second()
    run(recipe_of(tmp_path), tiny_base, tmp_path / "out", progress=second)
    assert f"another process is training {tmp_path / 'out'}" in second.said


def test_data_that_changed_meanwhile(tmp_path: Path, tiny_base: StoredBase) -> None:
    train_and_stop(recipe_of(tmp_path), tiny_base, tmp_path / "out", after=2)
    (tmp_path / "lines.jsonl").write_text((tmp_path / "lines.jsonl").read_text().replace("It is", "That is"))
    with pytest.raises(RunNotResumable, match=r"the data of .* changed since the run began: .* Restore it, or train"):
        resume_run(tmp_path / "out", tiny_base)
    log = run_path(tmp_path / "out") / "train_log.jsonl"
    log.write_text(re.sub('"transformers":"[^"]*"', '"transformers":"4.0.0"', log.read_text()))
    with pytest.raises(RunNotResumable, match=r"Restore it \(the run began with transformers 4.0.0\), or train again"):
        resume_run(tmp_path / "out", tiny_base)


@pytest.mark.parametrize("place", ["out/x", "out.run/x"])
def test_a_file_of_a_person_is_seen_before_the_steps_are_taken(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    train_and_stop(recipe_of(tmp_path), tiny_base, tmp_path / "out", after=2)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    monkeypatch.setattr(trainer, "load_base", None)
    with pytest.raises(OutputNotFresh):
        resume_run(tmp_path / "out", tiny_base)
    (tmp_path / place).unlink()
    assert any(run_path(tmp_path / "out").glob("step-*"))


def test_another_base_than_the_run_began_on(tmp_path: Path, tiny_base: StoredBase) -> None:
    train_and_stop(recipe_of(tmp_path), tiny_base, tmp_path / "out", after=2)
    other = StoredBase(tiny_base.path, BaseRef("tests/other", None, "fp1:" + "0" * 64), None)
    with pytest.raises(RunNotResumable, match="the base of"):
        resume_run(tmp_path / "out", other)


@pytest.mark.parametrize("kind", ["nothing", "a complete adapter"])
def test_nothing_to_resume(tmp_path: Path, tiny_base: StoredBase, kind: str) -> None:
    if kind != "nothing":
        run(recipe_of(tmp_path), tiny_base, tmp_path / "out")
    with pytest.raises(RunNotResumable) as caught:
        resume_run(tmp_path / "out", tiny_base)
    expected = "has no run to resume" if kind == "nothing" else "is complete: expected a stopped run"
    assert expected in str(caught.value)


def test_killed_between_the_adapter_and_the_tidying(tmp_path: Path, tiny_base: StoredBase) -> None:
    train_and_stop(recipe_of(tmp_path), tiny_base, tmp_path / "out", after=2)
    shutil.copytree(run_path(tmp_path / "out"), tmp_path / "kept")
    resume_run(tmp_path / "out", tiny_base)
    digest = sha256_of(tmp_path / "out" / WEIGHTS)
    shutil.move(tmp_path / "kept", run_path(tmp_path / "out"))
    shutil.copy(tmp_path / "out" / "train_log.jsonl", run_path(tmp_path / "out"))
    resume_run(tmp_path / "out", tiny_base)
    assert not run_path(tmp_path / "out").exists()
    assert sha256_of(tmp_path / "out" / WEIGHTS) == digest


def test_half_written_leftovers_are_deleted(tmp_path: Path, tiny_base: StoredBase) -> None:
    train_and_stop(recipe_of(tmp_path), tiny_base, tmp_path / "out", after=2)
    for leftover in (tmp_path / ".out.12ab34cd.tmp", run_path(tmp_path / "out") / ".step-000004.12ab34cd.tmp"):
        leftover.mkdir()
        (leftover / "half").touch()
    resume_run(tmp_path / "out", tiny_base)
    assert not list(tmp_path.glob(".out.*"))


def test_steps_are_kept_when_the_adapter_cannot_be_written(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path)
    run(recipe, tiny_base, tmp_path / "whole")

    def full(*args: Any) -> None:
        raise StorageFull("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_write_adapter_folder", full)
        with pytest.raises(StorageFull):
            run(recipe, tiny_base, tmp_path / "out")
    monkeypatch.setattr("train.objectives.sft.row_loss", full)  # no step is taken again
    monkeypatch.setattr("train.objectives.sft.held_out_loss", lambda model, samples: (1.0, 1))
    resume_run(tmp_path / "out", tiny_base)
    assert sha256_of(tmp_path / "whole" / WEIGHTS) == sha256_of(tmp_path / "out" / WEIGHTS)


def test_interrupting_at_once_keeps_the_last_checkpoint(tmp_path: Path, tiny_base: StoredBase) -> None:
    class Late(Interrupt):
        def step(self, done: RunStep, *, of: int) -> None:
            if done.step == 3:
                raise KeyboardInterrupt

    recipe = recipe_of(tmp_path)
    run(recipe, tiny_base, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tiny_base, tmp_path / "out", progress=Late())
    assert [path.name for path in run_path(tmp_path / "out").glob("step-*")] == ["step-000002"]
    resume_run(tmp_path / "out", tiny_base)
    assert sha256_of(tmp_path / "whole" / WEIGHTS) == sha256_of(tmp_path / "out" / WEIGHTS)


KILLS = 10 if "ADAPTERHUB_SOAK_S" in os.environ else 1
CHILD = """
import sys
from pathlib import Path
from adapterhub.adapter import BaseRef
from adapterhub.bases.store import StoredBase
from train.loop.progress import Lines
from train.recipe import read_recipe
from train.loop.run_folder import run_path
from train import trainer
folder, base, fingerprint = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
stored, out = StoredBase(base, BaseRef("tests/tiny-llama", None, fingerprint), None), folder / "out"
if run_path(out).is_dir() and (run_path(out) / "run.json").is_file():
    trainer.resume(out, stored, progress=Lines(sys.stderr))
else:
    trainer.train(read_recipe(folder / "mine.toml"), stored, out, progress=Lines(sys.stderr))
"""


def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = recipe_of(tmp_path, steps=40, checkpoint_every=1)
    run(recipe, tiny_base, tmp_path / "whole")
    draw = random.Random(5)
    arguments = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), str(tiny_base.path)]
    arguments.append(str(tiny_base.ref.fingerprint))
    kills = 0
    for kill in [True] * KILLS + [False]:
        child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        said = ""
        for line in child.stderr:  # the first step is taken: from here on, any moment
            said += line
            if kill and line.startswith("step "):
                time.sleep(draw.uniform(0, 0.3))
                child.kill()
                kills += 1
                break
        said += child.stderr.read()
        child.stderr.close()
        code = child.wait()
        if (tmp_path / "out" / WEIGHTS).exists() and not run_path(tmp_path / "out").exists():
            break
        assert kill or code == 0, said
    assert kills
    assert sha256_of(tmp_path / "whole" / WEIGHTS) == sha256_of(tmp_path / "out" / WEIGHTS)
    assert not run_path(tmp_path / "out").exists()


def overfitting(folder: Path, **train: Any) -> Recipe:
    """So fast that the held-out loss soon rises."""
    sizes = {"steps": 12, "learning_rate": 0.1, "schedule": "constant", "max_grad_norm": 10.0, "evaluate_every": 1}
    return make_recipe(folder, train=sizes | train)


def test_the_best_weights_are_kept(tmp_path: Path, tiny_base: StoredBase) -> None:
    """After two steps this fast the second has always undone the first; later the two may part on another machine."""
    end = run(overfitting(tmp_path, keep="best", steps=2), tiny_base, tmp_path / "out")
    found = losses(tmp_path / "out")
    assert found[-1] > min(found)  # or the test would show nothing
    assert end.evaluations[0].adapter_loss == pytest.approx(min(found), abs=1e-4)
    assert end.steps == 2


def test_patience_ends_a_run_that_no_longer_learns(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = overfitting(tmp_path, keep="best", patience=2, steps=40)
    end = run(recipe, tiny_base, tmp_path / "out")
    found = losses(tmp_path / "out")
    assert len(found) == end.steps < 40
    assert min(found) == found[-3] < min(found[-2:])
    assert end.evaluations[0].adapter_loss == pytest.approx(min(found), abs=1e-4)


def test_the_best_weights_survive_a_stop(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = overfitting(tmp_path, keep="best", patience=2, steps=40, checkpoint_every=3)
    end = run(recipe, tiny_base, tmp_path / "whole")
    train_and_stop(recipe, tiny_base, tmp_path / "parts", after=end.steps - 1)
    resume_run(tmp_path / "parts", tiny_base)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert sha256_of(tmp_path / "whole" / WEIGHTS) == sha256_of(tmp_path / "parts" / WEIGHTS)


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_an_optimizer_resumes_as_if_never_stopped(tmp_path: Path, name: Any) -> None:
    section = TrainSection(steps=1, optimizer=name)

    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(64, 96)), torch.nn.Parameter(torch.randn(8))]

    def step(optimizer: torch.optim.Optimizer, into: list[torch.nn.Parameter], number: int) -> None:
        torch.manual_seed(number)
        for parameter in into:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    whole = parameters()
    optimizer, choice = make_optimizer(whole, section)
    for number in range(4):
        step(optimizer, whole, number)
        if number == 1:
            save_optimizer(optimizer, tmp_path)
            parts = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    fresh, _ = make_optimizer(parts, section)
    load_optimizer(fresh, tmp_path)
    for number in (2, 3):
        step(fresh, parts, number)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
    assert ("unpaged: paging needs CUDA" in str(choice)) == name.startswith("paged")
    has_bytes = any(s.dtype == torch.uint8 for s in optimizer.state[whole[0]].values() if isinstance(s, torch.Tensor))
    assert has_bytes == name.endswith("8bit")
    assert json.loads((tmp_path / "optimizer.json").read_text()) is not None
    shutil.rmtree(tmp_path)


def test_a_run_that_is_resumed_on_another_day_renders_the_day_it_began(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(__file__).parents[2] / "fixtures/chat_templates/dated.jinja", tmp_path)
    recipe = make_recipe(
        tmp_path, data={"template": "dated.jinja"}, train={"steps": 6, "checkpoint_every": 2, "sample_every": 3}
    )

    def today_is(day: int) -> None:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> Day:
                return cls(2027, 3, day)

        monkeypatch.setattr(inputs, "datetime", SimpleNamespace(date=Day))

    asked: list[str] = []

    class Asked(trainer.FixedPrompts):
        def __init__(self, prompts: Sequence[str], tokenizer: Any, **options: Any) -> None:
            super().__init__(prompts, tokenizer, **options)
            asked.extend(tokenizer.decode(row) for row in self._rows[:1])

    monkeypatch.setattr(trainer, "FixedPrompts", Asked)
    today_is(1)
    run(recipe, tiny_base, tmp_path / "whole")
    train_and_stop(recipe, tiny_base, tmp_path / "parts", after=4)
    _record_no_date(run_path(tmp_path / "parts"), run_path(tmp_path / "undated"))
    today_is(2)
    for name in ("parts", "undated"):
        resume_run(tmp_path / name, tiny_base)
        assert sha256_of(tmp_path / "whole" / WEIGHTS) == sha256_of(tmp_path / name / WEIGHTS)
    run(recipe, tiny_base, tmp_path / "later")
    named = make_recipe(tmp_path, data={"template": "dated.jinja", "date": "2027-03-01"})
    run(named, tiny_base, tmp_path / "named")
    starts = [read_run_events(tmp_path / name / "train_log.jsonl")[0] for name in ("whole", "parts", "later", "named")]
    assert [start.date for start in starts if isinstance(start, RunStart)] == [
        "2027-03-01", "2027-03-01", "2027-03-02", "2027-03-01",
    ]  # fmt: skip
    assert ["Today is 01 Mar 2027." in prompt for prompt in asked] == [True, True, True, True, False]
    data = [start.data_sha256 for start in starts if isinstance(start, RunStart)]
    assert data[0] == data[1] == data[3] != data[2]


def _record_no_date(run: Path, into: Path) -> None:
    """Copy a stopped run as version 0.1.0 would have recorded it on the first of March."""
    shutil.copytree(run, into)
    log = into / "train_log.jsonl"
    assert '"date":"2027-03-01",' in log.read_text()
    log.write_text(log.read_text().replace('"date":"2027-03-01",', ""))
    began = datetime.datetime(2027, 3, 1, 12).timestamp()
    os.utime(into / "run.json", (began, began))
