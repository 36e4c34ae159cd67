"""The chat template a run renders with, and the strings that end an answer under it: the base's, or a recipe's."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapterhub.adapter import Adapter
from adapterhub.errors import RecipeError
from adapterhub.files import expanded
from adapterhub.package.layout import TEMPLATE_NAME
from train.recipe import SHIPPED_TEMPLATES, Recipe

_STOPS: dict[str, tuple[str, ...]] = {"guanaco": ("### Human:",)}
"""Guanaco ends no turn with a special token: what follows an answer inside a conversation is the next question."""


@dataclass(frozen=True)
class ChatTemplate:
    text: str | None
    """Jinja; None: the base's own"""
    stop: tuple[str, ...] = ()
    """what a server stops at beside the tokenizer's end of text"""


def chat_template_of(recipe: Recipe, start: Adapter | None) -> ChatTemplate:
    """What the recipe says, else what the adapter to go on from was trained with, else the base's.

    Raises RecipeError for a template that cannot be read, or is not the one of the adapter to go on from.
    """
    theirs = None
    if start is not None:
        text = (start.path / TEMPLATE_NAME).read_text(encoding="utf-8")
        theirs = ChatTemplate(text, tuple(start.manifest.chat.stop))
    if recipe.data.template is None:
        own = theirs or ChatTemplate(None)
        return ChatTemplate(own.text, recipe.data.stop if recipe.data.stop is not None else own.stop)
    named = _named(recipe.data.template, recipe.folder)
    chosen = ChatTemplate(named.text, recipe.data.stop if recipe.data.stop is not None else named.stop)
    if theirs is not None and chosen.text != theirs.text:
        raise RecipeError(
            f"template = {recipe.data.template!r} is not the template that the adapter to go on from was trained "
            "with: leave template out."
        )
    return chosen


def _named(name: str, folder: Path) -> ChatTemplate:
    if name in SHIPPED_TEMPLATES:
        shipped = package_files("train") / "chat_templates" / f"{name}.jinja"
        return ChatTemplate(shipped.read_text(encoding="utf-8"), _STOPS.get(name, ()))
    path = folder / expanded(name)
    try:
        text = path.read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"template {path} cannot be read ({error}): expected a Jinja file.") from error
    except TemplateSyntaxError as error:
        raise RecipeError(f"template {path} is not Jinja: line {error.lineno}: {error.message}.") from error
    return ChatTemplate(text)
