"""The command that lists the shipped recipes."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from adapterhub.cli.options import AsJson, table
from serve.config import DeviceKind


def recipes(
    device: Annotated[DeviceKind, typer.Option(help="Kind of device that trains.")] = DeviceKind.CUDA,
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with adapterhub.

    Shows what each trains and the most memory it can need on one device.
    """
    from train.planning.load import summarize
    from train.recipe import read_recipe, shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        text = path.read_text(encoding="utf-8")
        more = {"about": _about(text), "toml": text} if as_json else {}
        rows.append({"name": name, **summarize(read_recipe(path), device=device.value), **more})
    table(rows, as_json, empty="no recipes")


def _about(toml: str) -> str:
    """Return the comment that a recipe begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), toml.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines).strip()
