"""Recipes that learn from a server's feedback: exported to a file by the command, planned, trained and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training import make_recipe
from typer.testing import CliRunner

from adapterhub.adapter import StoredBase
from adapterhub.cli.main import app
from adapterhub.cli.training.feedback_export import feedback_exported
from adapterhub.errors import UsageError
from adapterhub.feedback.store import STORE_NAME, Correction, FeedbackStore
from adapterhub.package.run_record import read_run_record
from train.recipe import FileData, Recipe, read_recipe


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


def command(*words: str) -> str:
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_feedback_is_exported_beside_the_output_and_learnt(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore
) -> None:
    out = tmp_path / "out"
    command(str(recipe_of(tmp_path, tiny_base)), "-o", str(out))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["messages"][-1]["content"] for line in lines] == [f"It is {n}." for n in range(8)]
    kept = read_recipe(out / "recipe.toml").data
    assert isinstance(kept, FileData)
    assert kept.path == "out.jsonl"
    record = read_run_record(out)
    assert record is not None
    assert record.training.samples == 4


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
        assert written == tmp_path / "out.toml"
        assert found.preference == read_recipe(path).preference
        line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
        assert set(line) == {"prompt", *keys}


def test_a_stopped_run_resumes_with_the_feedback_it_began_with(
    tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore
) -> None:
    path = recipe_of(tmp_path, tiny_base)
    with feedback_exported(read_recipe(path), path, tmp_path / "out"):
        pass
    store.add(correction(99), owner="o")
    (tmp_path / "out.run").mkdir()
    with feedback_exported(read_recipe(path), path, tmp_path / "out"):
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 8
    (tmp_path / "out.run").rmdir()
    with feedback_exported(read_recipe(path), path, tmp_path / "out"):
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9


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
        assert written.read_text().replace('path = "out.jsonl"\n', "") == text.replace(source, 'source = "file"\n')
        assert found.data == FileData(source="file", path="out.jsonl", held_out=4)


def test_no_feedback_was_ever_kept(tmp_path: Path, tiny_base: StoredBase, home: Path) -> None:
    path = recipe_of(tmp_path, tiny_base)
    with pytest.raises(UsageError, match="no feedback"), feedback_exported(read_recipe(path), path, tmp_path / "out"):
        pass


def test_feedback_that_teaches_nothing(tmp_path: Path, tiny_base: StoredBase, store: FeedbackStore) -> None:
    store.delete("o")
    path = recipe_of(tmp_path, tiny_base)
    with (
        pytest.raises(UsageError, match="the feedback store has no answers yet"),
        feedback_exported(read_recipe(path), path, tmp_path / "out"),
    ):
        pass
