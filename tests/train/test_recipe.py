"""Recipes: parsing, messages about faults, and round trips through TOML."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from adapterhub.errors import RecipeError
from train.recipe import FileData, MixData, Recipe, read_recipe

SOUND = """
name = "mine"
base = "smollm2-135m-instruct"

[data]
source = "file"
path = "lines.jsonl"

[train]
epochs = 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(folder, text))
    return str(caught.value)


def test_a_short_recipe_gets_every_default(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, SOUND))
    assert (recipe.lora.rank, recipe.lora.targets, recipe.quantization.kind) == (16, "all-linear", "nf4")
    assert (recipe.train.loss_on, recipe.train.max_grad_norm, recipe.seed) == ("assistant", 0.3, 0)
    assert isinstance(recipe.data, FileData)


def test_relative_paths_start_at_the_recipe(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, SOUND)).folder == tmp_path


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    odd = (
        SOUND.replace("lines.jsonl", 'odd \\"name\\" \\\\ tab\\t \\u007f ü.jsonl')
        + '[lora]\ntargets = ["q_proj", "v_proj"]\n'
    )
    recipe = read_recipe(write(tmp_path, odd))
    again = read_recipe(write(tmp_path, recipe.to_toml()))
    assert again == recipe
    assert "learning_rate = 0.0002" in recipe.to_toml()


def test_unknown_key_names_the_nearest_and_its_section(tmp_path: Path) -> None:
    text = fault(tmp_path, SOUND + "learningrate = 1e-4\n")
    assert "[train]: unknown key 'learningrate' (nearest: learning_rate in [train])" in text


def test_key_in_the_wrong_section_names_the_right_one(tmp_path: Path) -> None:
    assert "unknown key 'alpha' (nearest: alpha in [lora])" in fault(tmp_path, SOUND + "alpha = 16\n")


def test_key_like_no_other_lists_the_known(tmp_path: Path) -> None:
    assert "known here: activation_checkpointing, batch_size" in fault(tmp_path, SOUND + "zzz = 1\n")


def test_unknown_section_is_refused(tmp_path: Path) -> None:
    assert "top level: unknown key 'quantisation'" in fault(tmp_path, SOUND + '[quantisation]\nkind = "nf4"\n')


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    broken = SOUND.replace('name = "mine"', 'name = "../mine"').replace("epochs = 2", 'epochs = "2"\nbatch_size = 0')
    text = fault(tmp_path, broken + '[lora]\nmethod = "qlora"\n')
    assert str(tmp_path / "mine.toml") in text
    assert "4 faults" in text
    for part in ("top level: name", "[train]: epochs = '2'", "[train]: batch_size = 0", "[lora]: method = 'qlora'"):
        assert part in text


def test_missing_key_is_named(tmp_path: Path) -> None:
    assert "[data]: path is missing" in fault(tmp_path, SOUND.replace('path = "lines.jsonl"', ""))


def test_unknown_source_lists_the_known(tmp_path: Path) -> None:
    text = fault(tmp_path, SOUND.replace('source = "file"', 'source = "web"'))
    assert "source: expected one of chatterbot, datasets, feedback, file, mix, shipped" in text


def test_key_of_another_source_is_refused(tmp_path: Path) -> None:
    assert "[data]: unknown key 'topic'" in fault(tmp_path, SOUND.replace("path =", 'topic = "x"\npath ='))


@pytest.mark.parametrize("lengths", ["", "epochs = 1\nsteps = 10"])
def test_neither_or_both_of_epochs_and_steps(tmp_path: Path, lengths: str) -> None:
    assert "[train]: expected either epochs or steps" in fault(tmp_path, SOUND.replace("epochs = 2", lengths))


def test_half_a_question_held_out(tmp_path: Path) -> None:
    text = fault(tmp_path, SOUND.replace("path =", "held_out = 2.5\npath ="))
    assert "[data]: held_out = 2.5: expected a fraction below 1, or a whole number of questions" in text


def test_infinite_learning_rate(tmp_path: Path) -> None:
    assert "learning_rate" in fault(tmp_path, SOUND + "learning_rate = inf\n")


def test_base_that_is_no_name(tmp_path: Path) -> None:
    assert "'a b' does not name a base model" in fault(tmp_path, SOUND.replace("smollm2-135m-instruct", "a b"))


def test_bad_toml_names_the_line(tmp_path: Path) -> None:
    assert "at line 3" in fault(tmp_path, '\nname = "x"\nbase = =\n')


def test_a_recipe_of_lists_in_lists(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("name = " + "[" * 10_000)
    with pytest.raises(RecipeError, match="is not TOML"):
        read_recipe(path)


def test_a_number_of_too_many_digits(tmp_path: Path) -> None:
    assert "is not TOML" in fault(tmp_path, f"rank = {'1' * 5000}\n")


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe(path)


def test_a_recipe_that_is_not_there_lists_the_shipped(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "none.toml")
    assert "demo-captain, demo-coding, demo-trivia, fsdp-70b" in str(caught.value)


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, SOUND))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_patience_without_held_out_losses(tmp_path: Path) -> None:
    assert "patience counts evaluations: set evaluate_every too" in fault(tmp_path, SOUND + "patience = 2\n")


def test_keeping_the_best_of_nothing_held_out(tmp_path: Path) -> None:
    text = SOUND.replace("path =", "held_out = 0\npath =") + 'keep = "best"\nevaluate_every = 1\n'
    assert "keep = best and patience need held-out questions" in fault(tmp_path, text)


def test_preference_needs_preference_data(tmp_path: Path) -> None:
    text = SOUND.replace('source = "file"\npath = "lines.jsonl"', 'source = "shipped"\nname = "captain"')
    assert "needs preference data: set source to file" in fault(tmp_path, text + '[preference]\nmethod = "dpo"\n')


def test_weights_of_kto_with_another_method(tmp_path: Path) -> None:
    text = fault(tmp_path, SOUND + '[preference]\nmethod = "dpo"\ndesirable_weight = 2.0\n')
    assert "[preference]: desirable_weight and undesirable_weight need method = kto, not dpo" in text


def test_an_unknown_preference_method(tmp_path: Path) -> None:
    assert "[preference]: method = 'ppo'" in fault(tmp_path, SOUND + '[preference]\nmethod = "ppo"\n')


def test_a_start_that_names_no_adapter(tmp_path: Path) -> None:
    assert "'a b' does not name an adapter" in fault(tmp_path, 'start = "a b"' + SOUND)


def test_sections_are_all_listed_for_the_nearest_key() -> None:
    assert set(Recipe.SECTIONS) == {"data", "lora", "train", "preference", "quantization"}


@pytest.mark.parametrize(
    ("data", "train", "words"),
    [
        ('format = "alpacca"', "", "[data]: format = 'alpacca'"),
        ('on_fault = "ignore"', "", "[data]: on_fault = 'ignore'"),
        (
            'template = "guanco"',
            "",
            "[data]: template = 'guanco': expected guanaco, alpaca or a .jinja file (nearest: gu",
        ),
        ('stop = [""]', "", "[data]: stop"),
        ('format = "text"', "", 'format = "text" has no answers: set loss_on = "all" in [train]'),
        ("held_out = 0", "evaluate_every = 5", "evaluate_every needs held-out questions"),
        ("", 'keep = "best"', "[train]: keep = best compares evaluations: set evaluate_every too"),
        ('format = "alpaca"', '[preference]\nmethod = "dpo"', "and labeled replies, not alpaca: leave format out"),
        ("", 'loss_on = "all"\n[preference]\nmethod = "dpo"', "trains replies only: leave loss_on out"),
    ],
)
def test_keys_of_data_in_conflict(tmp_path: Path, data: str, train: str, words: str) -> None:
    assert words in fault(tmp_path, SOUND.replace("[train]", f"{data}\n[train]") + train + "\n")


def test_several_conflicts_are_reported_at_once(tmp_path: Path) -> None:
    text = SOUND.replace("[train]", 'format = "text"\nheld_out = 0\n[train]') + "evaluate_every = 1\n"
    said = fault(tmp_path, text)
    assert "has no answers" in said
    assert "held-out questions" in said


def test_a_folder_of_data_with_a_revision(tmp_path: Path) -> None:
    text = SOUND.replace('source = "file"\npath = "lines.jsonl"', 'source = "datasets"\npath = "./x"\nrevision = "v1"')
    assert "path = './x' is a local folder, which has no revision" in fault(tmp_path, text)


MIX = """
name = "mine"
base = "smollm2-135m-instruct"

[data]
source = "mix"
date = 2026-12-01
duplicates = "keep"

[[data.sources]]
source = "file"
path = "a.jsonl"
columns = {prompt = "question"}
ignore = ["notes"]
weight = 2

[[data.sources]]
source = "shipped"
name = "captain"
weight = 0.5

[train]
epochs = 2
"""


def test_a_mix_of_sources_reads_back_equal(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, MIX))
    assert isinstance(recipe.data, MixData)
    assert [source.weight for source in recipe.data.sources] == [2, 0.5]
    assert recipe.data.date == datetime.date(2026, 12, 1)
    assert read_recipe(write(tmp_path, recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("weight = 2", "weight = 0", "[data]: weight = 0: Input should be greater than 0"),
        ("weight = 2", "held_out = 3", "[data]: unknown key 'held_out'"),
        ('path = "a.jsonl"', "", "[data]: path is missing"),
        ('source = "shipped"', 'source = "feedback"', "[data]: source: expected one of"),
        ("[train]", '[preference]\nmethod = "dpo"\n[train]', "needs preference data"),
        ('ignore = ["notes"]', 'format = "text"', 'format = "text" has no answers'),
        ('prompt = "question"', 'prompt = "question", response = "question"', "expected another column for each key"),
        ("date = 2026-12-01", 'date = "today"', "[data]: date = 'today'"),
        ('duplicates = "keep"', 'duplicates = "maybe"', "[data]: duplicates = 'maybe'"),
    ],
)
def test_a_mix_that_is_none(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert words in fault(tmp_path, MIX.replace(old, new))


def test_a_weight_without_other_sources(tmp_path: Path) -> None:
    text = fault(tmp_path, SOUND.replace("path =", "weight = 2\npath ="))
    assert "weight divides an epoch between sources: leave it out" in text


def test_the_documents_name_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    keys = {key for models in Recipe.SECTIONS.values() for model in models for key in model.model_fields}
    assert {key for key in keys if f"`{key}`" not in page} == set()
