"""A recipe's TOML and a form over it: changing a field changes its line and leaves the rest as the author wrote it.

What a recipe means, and whether it makes sense, is for the API to say.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import Any

from adapterhub.errors import RecipeError


@dataclass(frozen=True)
class Field:
    """One line of a recipe; `section` is empty for the lines before the first section."""

    section: str
    key: str
    label: str
    is_number: bool = True
    instead_of: str | None = None
    """another key of the section, which cannot stand beside this one"""


FIELDS = (
    Field("", "name", "Name", is_number=False),
    Field("", "base", "Base", is_number=False),
    Field("lora", "rank", "Rank"),
    Field("lora", "alpha", "Alpha"),
    Field("train", "learning_rate", "Learning rate"),
    Field("train", "batch_size", "Batch size"),
    Field("train", "epochs", "Epochs", instead_of="steps"),
    Field("train", "steps", "Steps (instead of epochs)", instead_of="epochs"),
)


def read_fields(recipe: str) -> list[Any]:
    """The value of each of FIELDS, None where the recipe does not say. Raises RecipeError for what is no TOML."""
    try:
        found = tomllib.loads(recipe)
    except (ValueError, RecursionError) as error:  # tomllib's own, a number too long, brackets too deep
        raise RecipeError(f"this is not TOML: {error}.") from error
    sections = [found if not field.section else found.get(field.section) for field in FIELDS]
    return [
        section.get(field.key) if isinstance(section, dict) else None
        for field, section in zip(FIELDS, sections, strict=True)
    ]


def with_field(recipe: str, field: Field, value: Any) -> str:
    """The recipe with one field set; None or an empty text removes its line."""
    before, body, after = _section(recipe, field.section)
    if value is None or value == "":
        return before + _without(body, field.key) + after
    if field.instead_of:
        body = _without(body, field.instead_of)
    line = f"{field.key} = {_toml(value, field)}"
    written, count = _line(field.key).subn(lambda found: line + (found["comment"] or "") + "\n", body, count=1)
    return before + (written if count else f"{body.rstrip()}\n{line}\n\n".lstrip("\n")) + after


def _section(recipe: str, name: str) -> tuple[str, str, str]:
    """The recipe cut in three: what stands before the section, the section, what follows it."""
    recipe = recipe if recipe.endswith("\n") else f"{recipe}\n"
    heads = list(re.finditer(r"^\[(.+?)\][^\n]*\n", recipe, re.MULTILINE))
    starts = [(head[1], head.end()) for head in heads] if name else [("", 0)]
    start = next((end for section, end in starts if section == name), None)
    if start is None:
        return f"{recipe.rstrip()}\n\n[{name}]\n", "", ""
    end = next((head.start() for head in heads if head.start() >= start), len(recipe))
    return recipe[:start], recipe[start:end], recipe[end:]


def _line(key: str) -> re.Pattern[str]:
    value = r"""(?:"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[^\n#"'])*?"""  # a # between quotes begins no comment
    return re.compile(rf"^{key}[ \t]*={value}(?P<comment>[ \t]*#[^\n]*)?[ \t]*(?:\n|\Z)", re.MULTILINE)


def _without(body: str, key: str) -> str:
    return _line(key).sub("", body, count=1)


def _toml(value: Any, field: Field) -> str:
    if field.is_number:
        number = float(value)
        return str(int(number)) if number.is_integer() and field.key != "learning_rate" else repr(number)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
