"""Read and edit the fields of a recipe's TOML; edits keep the author's comments and order.

The API validates recipes; this module only knows where each field is.
"""

from __future__ import annotations

import tomllib
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import tomlkit
from tomlkit import TOMLDocument
from tomlkit.exceptions import TOMLKitError

from adapterhub.errors import RecipeError


@dataclass(frozen=True)
class Field:
    """A field of the form: a key of the recipe; `section` is empty for keys before the first section."""

    section: str
    key: str
    label: str
    is_number: bool = True
    instead_of: str | None = None
    """Key of the same section that excludes this one."""


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
    """Return the value of each of FIELDS, None for keys that the recipe leaves out. Raises RecipeError."""
    try:
        found = tomllib.loads(recipe)
    except (ValueError, RecursionError) as error:  # tomllib's own, a number too long, brackets too deep
        raise _not_toml(error) from error
    sections = [found if not field.section else found.get(field.section) for field in FIELDS]
    return [
        section.get(field.key) if isinstance(section, dict) else None
        for field, section in zip(FIELDS, sections, strict=True)
    ]


def with_field(recipe: str, field: Field, value: Any) -> str:
    """Return the recipe with one field set; None or an empty text removes the key.

    Raises RecipeError for a text that is not TOML, or whose section is not a table.
    """
    try:
        document = tomlkit.parse(recipe)
    except (TOMLKitError, ValueError, RecursionError) as error:
        raise _not_toml(error) from error
    if value is None or value == "":
        _section(document, field.section).pop(field.key, None)
        return tomlkit.dumps(document)
    section = _section(document, field.section, create=True)
    if field.instead_of:
        section.pop(field.instead_of, None)
    section[field.key] = _toml_value(value, field)
    return tomlkit.dumps(document)


def _section(document: TOMLDocument, name: str, *, create: bool = False) -> MutableMapping[str, Any]:
    """Return a section of the document, or the document for an empty name; an absent one is empty, or created."""
    if not name:
        return document
    if name not in document:
        if not create:
            return {}
        if document:
            document.add(tomlkit.nl())
        document[name] = tomlkit.table()
    section = document[name]
    if not isinstance(section, MutableMapping):
        raise RecipeError(f"{name!r} in the recipe is not a table: expected a section [{name}]. Correct the recipe.")
    return section


def _not_toml(error: Exception) -> RecipeError:
    return RecipeError(f"the recipe is not TOML ({error}): expected keys and sections. Correct the text.")


def _toml_value(value: Any, field: Field) -> str | int | float:
    if not field.is_number:
        return str(value)
    number = float(value)
    return int(number) if number.is_integer() and field.key != "learning_rate" else number
