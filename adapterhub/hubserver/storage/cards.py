"""Metadata of a repository: the YAML header of its README.md and its adapter_config.json, as tags."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from adapterhub.hubserver.errors import InvalidCard, InvalidName
from adapterhub.hubserver.names import RepoId

CARD_NAME = "README.md"
ADAPTER_CONFIG_NAME = "adapter_config.json"
MAX_METADATA_BYTES = 1 << 20
"""Largest README.md or adapter_config.json that is read for tags, in bytes."""
_HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MAX_HEAD = 64 << 10
_MAX_DEPTH = 20


def parse_card(text: str) -> dict[str, Any]:
    """Return the YAML header of a model card, or {} if there is none. Raises InvalidCard with the line of the fault."""
    head = _HEAD.match(text)
    if head is None:
        return {}
    if len(head[1]) > _MAX_HEAD:
        raise InvalidCard(f"the YAML header has {len(head[1])} characters: expected at most {_MAX_HEAD}.")
    try:
        _check_cost(head[1])
        card = yaml.safe_load(head[1])
        # Convert to JSON and back: dates become text, and values that JSON does not have raise an error here.
        plain = json.loads(json.dumps(card, default=str, allow_nan=False))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InvalidCard(f"the YAML header cannot be parsed: {' '.join(str(error).split())}") from None
    if plain is not None and not isinstance(plain, dict):
        raise InvalidCard("the YAML header is not a mapping: expected lines of 'key: value'.")
    return plain or {}


def _check_cost(head: str) -> None:
    """Refuse YAML that is short but expensive to parse, before it is parsed. Raises InvalidCard."""
    depth = 0
    for event in yaml.parse(head, Loader=yaml.SafeLoader):
        # With aliases, a few lines can expand to gigabytes of JSON.
        if isinstance(event, yaml.AliasEvent):
            raise InvalidCard("the YAML header uses an alias (*name): write the value out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        # 5,000 open brackets took 10 s of a core.
        if depth > _MAX_DEPTH:
            raise InvalidCard(f"the YAML header is nested too deeply: expected at most {_MAX_DEPTH} levels.")


@dataclass(frozen=True)
class Facts:
    """The metadata of a repository, for filters and for its page."""

    card: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    library_name: str | None = None
    pipeline_tag: str | None = None
    base_models: tuple[str, ...] = ()
    relation: str | None = None
    """Relation to the base models: adapter, finetune, merge or quantized."""
    adapter_config: dict[str, Any] = field(default_factory=dict)


def facts_of(*, card_bytes: bytes | None, config_bytes: bytes | None, has_safetensors: bool) -> Facts:
    """Read the metadata from a README.md and an adapter_config.json; None stands for a file that does not exist.

    Files that cannot be parsed are ignored.
    """
    is_adapter = config_bytes is not None
    card, config = _card_or_empty(card_bytes or b""), _json_or_empty(config_bytes or b"")
    library = _text(card.get("library_name")) or ("peft" if is_adapter else None)
    pipeline_tag = _text(card.get("pipeline_tag"))
    bases = _texts(card.get("base_model")) or _repo_names(config.get("base_model_name_or_path"))
    relation = _text(card.get("base_model_relation")) or ("adapter" if is_adapter else "finetune")
    tags = [
        *([library] if library else []),
        # The card that PEFT's push_to_hub writes has the library "transformers".
        *(["peft"] if is_adapter else []),
        *(["safetensors"] if has_safetensors else []),
        *_texts(card.get("tags")),
        *([pipeline_tag] if pipeline_tag else []),
        *_texts(card.get("language")),
        *(f"dataset:{name}" for name in _texts(card.get("datasets"))),
        *(f"license:{name}" for name in _texts(card.get("license"))),
        *(f"base_model:{name}" for name in bases),
        *(f"base_model:{relation}:{name}" for name in bases),
    ]
    return Facts(
        card=card,
        tags=tuple(dict.fromkeys(tags)),
        library_name=library,
        pipeline_tag=pipeline_tag,
        base_models=tuple(bases),
        relation=relation if bases else None,
        adapter_config=config,
    )


def _card_or_empty(data: bytes) -> dict[str, Any]:
    try:
        return parse_card(data.decode("utf-8", "replace"))
    except InvalidCard:
        return {}


def _json_or_empty(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in map(_text, values) if text is not None]


def _repo_names(value: object) -> list[str]:
    """Return the value if it is `owner/name`: PEFT also writes folders of the training machine here."""
    try:
        return [str(RepoId.parse(value))] if isinstance(value, str) else []
    except InvalidName:
        return []
