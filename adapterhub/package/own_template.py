"""The chat template of an adapter folder, wherever a version of transformers wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterhub.errors import InvalidManifest
from adapterhub.package.layout import TEMPLATE_NAME
from adapterhub.strict import parse_json

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_DEFAULT = "default"


def own_template(folder: Path) -> tuple[str, str] | None:
    """Return (template, name of the file that has it), or None where the folder has no template.

    chat_template.jinja comes first; tokenizer_config.json has it in folders that transformers before 4.52 wrote, as
    a text or as a list of named templates, of which `default` is for chat. Raises InvalidManifest for a file that is
    not JSON and for a list without a default.
    """
    path = folder / TEMPLATE_NAME
    if path.is_file() and (text := path.read_text(encoding="utf-8")).strip():
        return text, TEMPLATE_NAME
    found = tokenizer_config(folder).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if not isinstance(named.get(_DEFAULT), str):
            raise InvalidManifest(
                f"{folder / TOKENIZER_CONFIG_NAME} has chat templates named {', '.join(map(str, named))}: expected one "
                f"named {_DEFAULT}. Write the one for chat to {path}."
            )
        found = named[_DEFAULT]
    return (found, TOKENIZER_CONFIG_NAME) if isinstance(found, str) and found.strip() else None


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, empty where there is none. Raises InvalidManifest."""
    path = folder / TOKENIZER_CONFIG_NAME
    try:
        found = parse_json(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise InvalidManifest(f"{path} is not JSON ({error}): save the tokenizer again.") from error
    return found if isinstance(found, dict) else {}
