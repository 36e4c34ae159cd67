"""Recipes that learn from a server's feedback: exported to a file by the command, planned, trained and resumed."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from feedback_rows import answer, asked, thumb
from feedback_rows import correction as correction_of
from pydantic import ValidationError
from training import make_recipe
from typer.testing import CliRunner

from adapterhub.adapter import StoredBase
from adapterhub.cli.main import app
from adapterhub.cli.training.feedback_export import feedback_exported
from adapterhub.errors import DatasetError, OutputNotFresh, UsageError
from adapterhub.feedback.store import STORE_NAME, Correction, FeedbackStore, PromptMessage, Thumb
from adapterhub.package.run_record import read_run_record
from train.inputs import load_inputs
from train.loop.run_folder import RunFolder, State
from train.recipe import FileData, Recipe, read_recipe

DIGEST = "sha256:" + "c" * 64


def correction(number: int) -> Correction:
    return Correction.model_validate(
        {
            "kind": "correction",
            "messages": [{"role": "user", "content": f"What is {number}?"}],
            "answer": {"model": "m", "text": "No idea."},
            "text": f"It is {number}.",
        }
    )


@pytest.fixture
def store(home: Path) -> FeedbackStore:
    """With eight corrections, where servers of this machine keep them."""
    kept = FeedbackStore(home / STORE_NAME)
    for number in range(8):
        kept.add(correction(number), owner="o")
    return kept


def recipe_of(folder: Path, base: StoredBase, *, preference: str = "") -> Path:
    make_recipe(folder, data={"source": "feedback"})
    path = folder / "mine.toml"
    text = path.read_text().replace("smollm2-135m-instruct", str(base.path)).replace('path = "lines.jsonl"\n', "")
    path.write_text(text + preference)
    return path


def exported(path: Path, output: Path) -> AbstractContextManager[tuple[Recipe, Path]]:
    return feedback_exported(read_recipe(path), path, output)


def write_checkpoint(run: Path) -> None:
    (run / "step-000001").mkdir()
    (run / "step-000001" / "state.json").write_text(State(step=1).model_dump_json())


def command(*words: str) -> str:
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_feedback_is_exported_into_the_run_s_folder_and_learnt(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore
) -> None:
    out = tmp_path / "out"
    command(str(recipe_of(tmp_path, tiny_base)), "-o", str(out))
    kept = read_recipe(out / "recipe.toml")
    assert isinstance(kept.data, FileData)
    assert (kept.data.path, kept.data.on_fault, kept.train.loss_on) == ("feedback.jsonl", "skip", "last")
    record = read_run_record(out)
    assert record is not None
    assert record.training.samples == 4
    assert not (tmp_path / "out.run").exists(), "the texts of feedback stay in the store only"


def test_a_person_s_files_are_not_overwritten(tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore) -> None:
    """A recipe with the name of its output, and data beside it under the same name."""
    recipe_of(tmp_path, tiny_base)
    texts = {"mine.toml": (tmp_path / "mine.toml").read_text(), "mine.jsonl": "my own notes\n"}
    (tmp_path / "mine.jsonl").write_text(texts["mine.jsonl"])
    command(str(tmp_path / "mine.toml"), "-o", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "recipe.toml").is_file()
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


@pytest.mark.parametrize("name", ["notes.txt", "feedback.csv", "step-one"])
def test_a_folder_that_is_no_run_s_is_refused(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore, name: str
) -> None:
    path = recipe_of(tmp_path, tiny_base)
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / name).write_text("mine")
    with pytest.raises(OutputNotFresh, match=rf"out\.run holds {name}"), exported(path, tmp_path / "out"):
        pass
    assert [one.name for one in (tmp_path / "out.run").iterdir()] == [name]


def test_a_file_where_the_run_would_work_is_refused(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore
) -> None:
    path = recipe_of(tmp_path, tiny_base)
    (tmp_path / "out.run").write_text("mine")
    with pytest.raises(OutputNotFresh, match=r"out\.run is a file"), exported(path, tmp_path / "out"):
        pass
    assert (tmp_path / "out.run").read_text() == "mine"


def test_a_stopped_run_of_another_recipe_is_left_alone(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore
) -> None:
    path = recipe_of(tmp_path, tiny_base)
    (tmp_path / "out.run").mkdir()
    write_checkpoint(tmp_path / "out.run")
    with pytest.raises(OutputNotFresh, match="holds a stopped run"), exported(path, tmp_path / "out"):
        pass
    assert {one.name for one in (tmp_path / "out.run").iterdir()} <= {"step-000001", "lock"}


def test_an_active_run_keeps_its_export(tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore) -> None:
    """It has no checkpoint yet: the same command, given again meanwhile, leaves all of it alone."""
    path = recipe_of(tmp_path, tiny_base)
    with exported(path, tmp_path / "out") as (found, _):
        with RunFolder.create(tmp_path / "out", found, start=None) as run:
            before = sorted(run.path.iterdir())
            store.add(correction(99), owner="o")
            with pytest.raises(OutputNotFresh, match="another process"), exported(path, tmp_path / "out"):
                pass
            assert sorted(run.path.iterdir()) == before
            assert len((run.path / "feedback.jsonl").read_text().splitlines()) == 8
        # Its processes may be started again: they read the recipe once more.
        assert (run.path / "feedback.toml").is_file()
    assert not run.path.exists()


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore
) -> None:
    path = recipe_of(tmp_path, tiny_base)
    path.write_text(path.read_text().replace("held_out = 4", "held_out = 99"))
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["train", str(path), "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, DatasetError)
    assert sorted(tmp_path.iterdir()) == before


def test_only_the_judged_answer_is_trained(tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore) -> None:
    """The conversation before it holds an answer that was disliked."""
    store.delete("o")
    talk = asked("Capital of France?", "Lyon.", "Sure?")
    store.add(Thumb.model_validate(thumb(talk[:1], answer("Lyon."), "down")), owner="o")
    store.add(Thumb.model_validate(thumb(talk, answer("Sorry, Paris."), "up")), owner="o")
    path = recipe_of(tmp_path, tiny_base)
    path.write_text(path.read_text().replace("held_out = 4", "held_out = 0"))
    with exported(path, tmp_path / "out") as (recipe, _):
        inputs = load_inputs(recipe, tiny_base, start=None)
    (sample,) = inputs.objective.samples_at(0)
    trained = [token for token, mark in zip(sample.tokens, sample.trained, strict=True) if mark]
    assert inputs.tokenizer.decode(trained) == "Sorry, Paris.<|im_end|>"
    assert "Lyon." in inputs.tokenizer.decode(sample.tokens)


def test_every_token_of_a_conversation_is_not_what_was_judged(tmp_path: Path) -> None:
    raw = {"name": "x", "base": "x", "data": {"source": "feedback"}, "train": {"steps": 1, "loss_on": "all"}}
    with pytest.raises(ValidationError, match="trains the judged answers only"):
        Recipe.model_validate(raw)


@pytest.mark.parametrize("method", [None, "dpo", "kto", "orpo"])
def test_a_row_that_the_template_refuses_is_left_out_and_counted(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore, method: str | None
) -> None:
    messages = [PromptMessage(role="system", content="Be brief."), *correction(99).messages]
    store.add(correction(99).model_copy(update={"messages": messages}), owner="o")
    path = recipe_of(tmp_path, tiny_base, preference=f'[preference]\nmethod = "{method}"\n' if method else "")
    template = (tiny_base.path / "chat_template.jinja").read_text()
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(refusing + template)
    text = path.read_text().replace("held_out = 4", 'held_out = 0\ntemplate = "own.jinja"')
    path.write_text(text)
    with exported(path, tmp_path / "out") as (recipe, _):
        objective = load_inputs(recipe, tiny_base, start=None).objective
    assert objective.num_samples == (16 if method == "kto" else 8)
    (note,) = [note for note in objective.notes if "cannot render" in note]
    assert "no system message" in note


@pytest.mark.parametrize(
    ("adapters", "count"),
    [(None, 2), ("all", 8 + 3), (["poet"], 1), (["captain", "poet"], 2), ([DIGEST], 1)],
    ids=["those of the start", "all", "another", "two", "a digest"],
)
def test_rows_about_other_adapters_are_left_out_unless_asked_for(
    tmp_path: Path, store: FeedbackStore, adapters: Any, count: int
) -> None:
    """The eight rows of the store are about `m`."""
    for given in (answer("No.", "captain"), answer("No.", "old name", DIGEST), answer("No.", "poet")):
        store.add(Correction.model_validate(correction_of(asked("Hi?"), given, "Yes.")), owner="o")
    data = {"source": "feedback"} | ({"adapters": adapters} if adapters else {})
    raw = {"name": "x", "base": "x", "start": "captain", "data": data, "train": {"steps": 1}}
    recipe = Recipe.model_validate(raw | {"preference": {"method": "dpo"}})
    start: Any = SimpleNamespace(digest=DIGEST)
    with feedback_exported(recipe, tmp_path / "x.toml", tmp_path / "out", start=start):
        assert len((tmp_path / "out.run" / "feedback.jsonl").read_text().splitlines()) == count


def test_a_plan_leaves_no_export_behind(tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore) -> None:
    path = recipe_of(tmp_path, tiny_base)
    before = sorted(tmp_path.iterdir())
    assert "4 samples to train on" in command(str(path), "--plan", "-o", str(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("method", "keys"), [("dpo", {"chosen", "rejected"}), ("kto", {"completion", "label"})])
def test_preference_recipes_get_what_their_method_reads(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore, method: str, keys: set[str]
) -> None:
    path = recipe_of(tmp_path, tiny_base, preference=f'[preference]\nmethod = "{method}"\n')
    with feedback_exported(read_recipe(path), path, tmp_path / "out") as (found, written):
        assert written == tmp_path / "out.run" / "feedback.toml"
        assert found.preference == read_recipe(path).preference
        line = json.loads((written.parent / "feedback.jsonl").read_text().splitlines()[0])
        assert set(line) == {"id", "prompt", *keys}


def test_a_stopped_run_resumes_with_the_feedback_it_began_with(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore
) -> None:
    path, lines = recipe_of(tmp_path, tiny_base), tmp_path / "out.run" / "feedback.jsonl"
    with exported(path, tmp_path / "out"):
        write_checkpoint(tmp_path / "out.run")
    store.add(correction(99), owner="o")
    with exported(path, tmp_path / "out"):
        assert len(lines.read_text().splitlines()) == 8
    shutil.rmtree(tmp_path / "out.run")
    with exported(path, tmp_path / "out"):
        assert len(lines.read_text().splitlines()) == 9


def test_paths_beside_the_recipe_still_resolve_there(tmp_path: Path, store: FeedbackStore) -> None:
    data = {"source": "feedback", "template": "mine.jinja"}
    raw = {"name": "x", "base": "x", "start": "./adapter", "data": data, "train": {"steps": 1}}
    recipe = Recipe.model_validate(raw)
    recipe._folder = tmp_path / "there"
    with feedback_exported(recipe, tmp_path / "x.toml", tmp_path / "out") as (found, _):
        assert found.start == str(tmp_path / "there" / "adapter")
        assert found.data.template == str(tmp_path / "there" / "mine.jinja")


def test_the_exported_recipe_keeps_comments(tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore) -> None:
    path = recipe_of(tmp_path, tiny_base)
    text = f"# From votes.\n{path.read_text()}".replace("rank = 4", "rank = 4 # small")
    path.write_text(text)
    with feedback_exported(read_recipe(path), path, tmp_path / "out") as (found, written):
        source = 'source = "feedback"\n'
        assert source in text
        added = ('path = "feedback.jsonl"\n', 'on_fault = "skip"\n', 'loss_on = "last"\n')
        kept = "".join(line for line in written.read_text().splitlines(keepends=True) if line not in added)
        assert kept == text.replace(source, 'source = "file"\n')
        assert found.data == FileData(source="file", path="feedback.jsonl", held_out=4, on_fault="skip")


def test_no_feedback_was_ever_kept(tmp_path: Path, tiny_base: StoredBase, home: Path) -> None:
    path = recipe_of(tmp_path, tiny_base)
    with pytest.raises(UsageError, match="no feedback"), feedback_exported(read_recipe(path), path, tmp_path / "out"):
        pass


def test_feedback_that_teaches_nothing(tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore) -> None:
    store.delete("o")
    path = recipe_of(tmp_path, tiny_base)
    with (
        pytest.raises(UsageError, match="there is no feedback to train from: 0 rows, no answers"),
        feedback_exported(read_recipe(path), path, tmp_path / "out"),
    ):
        pass
