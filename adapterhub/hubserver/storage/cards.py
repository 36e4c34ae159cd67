"""What a repository says about itself: the YAML head of its README and its adapter_config.json, as tags.

Knows no HTTP and no store.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from adapterhub.hubserver.errors import BadCard, BadName
from adapterhub.hubserver.names import RepoId

CARD_NAME = "README.md"
ADAPTER_CONFIG_NAME = "adapter_config.json"
MAX_DESCRIBING_BYTES = 1 << 20
"""a README or adapter_config.json larger than this is not read for tags"""
_HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MAX_HEAD = 64 << 10
_MAX_DEPTH = 20


def parse_card(text: str) -> dict[str, Any]:
    """The YAML head of a model card, or {} when there is none. Raises BadCard with the line of the fault."""
    head = _HEAD.match(text)
    if head is None:
        return {}
    if len(head[1]) > _MAX_HEAD:
        raise BadCard(f"the YAML head is longer than {_MAX_HEAD} characters.")
    try:
        _check_is_modest(head[1])
        card = yaml.safe_load(head[1])
        # Through JSON and back: dates become text, and what JSON cannot say is found here.
        plain = json.loads(json.dumps(card, default=str, allow_nan=False))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise BadCard(f"the YAML head cannot be read: {' '.join(str(error).split())}") from None
    if plain is not None and not isinstance(plain, dict):
        raise BadCard("the YAML head must be a mapping (key: value).")
    return plain or {}


def _check_is_modest(head: str) -> None:
    """Raises BadCard for what is small as text but costly to read: found before it is built."""
    depth = 0
    for event in yaml.parse(head, Loader=yaml.SafeLoader):
        # An alias lets a few lines stand for gigabytes once written out as JSON.
        if isinstance(event, yaml.AliasEvent):
            raise BadCard("the YAML head uses an alias (*name); write the value out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        # 5,000 open brackets took 10 s of a core.
        if depth > _MAX_DEPTH:
            raise BadCard(f"the YAML head is nested more than {_MAX_DEPTH} deep.")


@dataclass(frozen=True)
class Facts:
    """What lists are filtered by and what a model's page tells."""

    card: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    library_name: str | None = None
    pipeline_tag: str | None = None
    base_models: tuple[str, ...] = ()
    relation: str | None = None
    """how it comes from its base models: adapter, finetune, merge or quantized"""
    adapter_config: dict[str, Any] = field(default_factory=dict)


def facts_of(*, card_bytes: bytes | None, config_bytes: bytes | None, has_safetensors: bool) -> Facts:
    """Facts from a README.md and an adapter_config.json (None: there is none); what cannot be read is left out."""
    is_adapter = config_bytes is not None
    card, config = _card_or_empty(card_bytes or b""), _json_or_empty(config_bytes or b"")
    library = _text(card.get("library_name")) or ("peft" if is_adapter else None)
    pipeline_tag = _text(card.get("pipeline_tag"))
    bases = _texts(card.get("base_model")) or _repo_names(config.get("base_model_name_or_path"))
    relation = _text(card.get("base_model_relation")) or ("adapter" if is_adapter else "finetune")
    tags = [
        *([library] if library else []),
        # PEFT's own push writes a card that says "transformers".
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
    except BadCard:
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
    """`owner/name` only: PEFT also writes folders of the training machine here, which nobody should see as a tag."""
    try:
        return [str(RepoId.parse(value))] if isinstance(value, str) else []
    except BadName:
        return []
