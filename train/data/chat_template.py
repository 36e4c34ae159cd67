"""Choose the chat template of a run, and the strings that end an answer under it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from adapterhub.adapter import Adapter
from adapterhub.chat_template import check_template, render_chat
from adapterhub.errors import RecipeError
from adapterhub.files import expanded
from adapterhub.package.layout import TEMPLATE_NAME
from train.data.tokenization import THINK
from train.recipe import SHIPPED_TEMPLATES, Recipe

_STOPS: dict[str, tuple[str, ...]] = {"guanaco": ("### Human:",)}
"""Stop strings of shipped templates. Guanaco ends no turn with a special token: the next question follows."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its stop strings."""

    text: str | None
    """Jinja source; None: the base's own template."""
    stop: tuple[str, ...] = ()
    """Strings at which a server stops, besides the tokenizer's EOS."""


def chat_template_of(recipe: Recipe, start: Adapter | None) -> ChatTemplate:
    """Return the template of the recipe, else that of the start adapter, else the base's.

    Raises RecipeError for a template that cannot be read, or that differs from the start adapter's.
    """
    of_start = None
    if start is not None:
        text = (start.path / TEMPLATE_NAME).read_text(encoding="utf-8")
        of_start = ChatTemplate(text, tuple(start.manifest.chat.stop))
    if recipe.data.template is None:
        default = of_start or ChatTemplate(None)
        return ChatTemplate(default.text, recipe.data.stop if recipe.data.stop is not None else default.stop)
    named = _named(recipe.data.template, recipe.folder)
    chosen = ChatTemplate(named.text, recipe.data.stop if recipe.data.stop is not None else named.stop)
    if of_start is not None and chosen.text != of_start.text:
        raise RecipeError(
            f"template = {recipe.data.template!r} differs from the template of the start adapter: expected the same "
            "one. Leave template out of [data]."
        )
    return chosen


def template_notes(tokenizer: Any) -> list[str]:
    """Return what a reader should know about the tokenizer's chat template: how it opens answers and thoughts."""
    question, answer = {"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}
    try:
        plain = render_chat(tokenizer, [question])
        prompt = render_chat(tokenizer, [question], add_generation_prompt=True)
        whole = render_chat(tokenizer, [question, answer])
    except Exception:  # the data may have what the template wants; if not, its rows are reported
        return []
    if prompt.rstrip().endswith(THINK):
        return [f"the chat template opens {THINK} in every prompt: the thoughts of each trained answer follow it"]
    opening = whole[len(prompt) :].partition(str(answer["content"]))[0].strip()
    if not whole.startswith(prompt) or not opening:
        return []
    if prompt == plain:
        return [
            f"the chat template has no generation prompt: {opening!r} is trained as a part of each answer, and a "
            "server's answers begin with it"
        ]
    return [f"the chat template writes {opening!r} between prompt and answer: it is trained as a part of the answer"]


def _named(name: str, folder: Path) -> ChatTemplate:
    if name in SHIPPED_TEMPLATES:
        shipped = package_files("train") / "chat_templates" / f"{name}.jinja"
        return ChatTemplate(shipped.read_text(encoding="utf-8"), _STOPS.get(name, ()))
    path = folder / expanded(name)
    try:
        text = path.read_text(encoding="utf-8")
        check_template(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"cannot read template {path} ({error}): expected a Jinja file. Correct template in [data]."
        ) from error
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"invalid template {path}, line {error.lineno} ({error.message}): expected Jinja. Correct the file."
        ) from error
    return ChatTemplate(text)
