"""Verbs that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.shared import (
    say,
)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.toml", help="A recipe file, or the name of a shipped one.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A fresh folder [default: ./ and the recipe's name].")
    ] = None,
) -> None:
    """Train a QLoRA adapter from a recipe."""
    from adapterhub.adapter import BaseName
    from adapterhub.base_store import pull_base
    from adapterhub.errors import RecipeError
    from train.recipe import read_recipe, shipped_recipes

    path = Path(recipe)
    if not path.is_file():
        shipped = shipped_recipes()
        if recipe not in shipped:
            raise RecipeError(f"there is no recipe {recipe}: expected a file, or one of {', '.join(sorted(shipped))}.")
        path = shipped[recipe]
    parsed = read_recipe(path)
    base = pull_base(BaseName.parse(parsed.base), report=say)
    folder = output or Path(parsed.name)
    from train.trainer import fit

    end = fit(parsed, base, folder)
    for evaluation in end.evaluations:
        say(
            f"held-out loss on {evaluation.data}: {evaluation.base_loss:.3f} (base) -> {evaluation.adapter_loss:.3f} "
            f"over {evaluation.tokens} tokens"
        )
    say(f"next: adapterhub pack {folder}")
    typer.echo(folder)
