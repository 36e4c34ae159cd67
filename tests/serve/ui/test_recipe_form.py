"""The form over a recipe: one value changes, comments and order stay, and the result is TOML."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from adapterhub.errors import RecipeError
from serve.ui.recipe_form import FIELDS, Field, read_fields, with_field

NAME, BASE, RANK, ALPHA, RATE, BATCH, EPOCHS, STEPS = FIELDS
RECIPE = 'name = "captain"\nbase = "tiny"  # small\n\n[lora]\nrank = 16\nalpha = 32\n\n[train]\nepochs = 1\n'


@pytest.mark.parametrize(("field", "value"), [(NAME, "poet"), (BASE, "other"), (RANK, 8), (ALPHA, 64), (BATCH, 4)])
def test_line_without_a_comment(field: Field, value: Any) -> None:
    before, after = read_fields(RECIPE), read_fields(with_field(RECIPE, field, value))
    assert after == [value if one is field else old for one, old in zip(FIELDS, before, strict=True)]


@pytest.mark.parametrize("line", ['name = "a#b"', "name = 'a#b'", r'name = "a\"#b"'])
@pytest.mark.parametrize("comment", ["", '  # why "this"'])
def test_hash_inside_quotes(line: str, comment: str) -> None:
    assert with_field(f"{line}{comment}\nbase = 1\n", NAME, "c") == f'name = "c"{comment}\nbase = 1\n'
    assert with_field(f"{line}{comment}\nbase = 1\n", NAME, None) == "base = 1\n"


def test_last_section_without_a_line_end() -> None:
    assert tomllib.loads(with_field('name = "x"\n\n[lora]', RANK, 8)) == {"name": "x", "lora": {"rank": 8}}
    assert tomllib.loads(with_field("[lora]\nrank = 4", ALPHA, 8)) == {"lora": {"rank": 4, "alpha": 8}}


def test_recipe_that_is_empty() -> None:
    assert tomllib.loads(with_field("", NAME, "x")) == {"name": "x"}
    assert tomllib.loads(with_field("", STEPS, 3)) == {"train": {"steps": 3}}


@pytest.mark.parametrize("recipe", ["name = ", f"rank = {'[' * 100_000}", f"rank = {'1' * 5000}"])
def test_text_that_is_not_toml(recipe: str) -> None:
    with pytest.raises(RecipeError, match="not TOML"):
        read_fields(recipe)


@pytest.mark.parametrize("recipe", ["name = ", f"rank = {'[' * 100_000}"])
def test_text_that_is_not_toml_is_not_edited(recipe: str) -> None:
    with pytest.raises(RecipeError, match="not TOML"):
        with_field(recipe, NAME, "x")


@pytest.mark.parametrize("recipe", ["lora = 3\n", "[[lora]]\nrank = 4\n"])
@pytest.mark.parametrize("value", [8, None])
def test_section_that_is_not_a_table(recipe: str, value: int | None) -> None:
    with pytest.raises(RecipeError, match=r"'lora' in the recipe is not a table: expected a section \[lora\]"):
        with_field(recipe, RANK, value)


COMMENTED = """\
# My recipe.
name = "captain"
data.source = "shipped" # dotted
train = { steps = 3, batch_size = 2 } # inline

# What is adapted.
[lora] # small
rank = 4 # try 8
  # indented
alpha = 8
"""


def test_comments_and_order_stay() -> None:
    edited = with_field(with_field(COMMENTED, RANK, 8), STEPS, 5)
    assert edited == COMMENTED.replace("rank = 4", "rank = 8").replace("steps = 3", "steps = 5")
    assert with_field(COMMENTED, ALPHA, None) == COMMENTED.replace("alpha = 8\n", "")


def test_value_in_a_multiline_string_or_table() -> None:
    text = 'name = "x"\nnote = """\nrank = 1\n[lora]\n"""\n\n[lora]\nrank = 2\n'
    assert with_field(text, RANK, 8) == text.replace("rank = 2", "rank = 8")
