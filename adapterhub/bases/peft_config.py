"""The PEFT config of an adapter folder, safe to be handed to PEFT: without a pattern of its author's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from adapterhub.package.lora_config import NO_LAYERS, read_lora_config
from adapterhub.package.module_patterns import matches

_Value = TypeVar("_Value")

PATTERN_FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
"""Fields of the config that may have patterns."""


def peft_config(folder: Path, model: Any) -> Any:
    """Return the folder's `peft.LoraConfig` for a base model, each pattern replaced by the names that it matches there.

    PEFT matches patterns with Python's own engine, which may take forever on one. Raises AdapterUnsupported.
    """
    from peft import LoraConfig

    ours, config = read_lora_config(folder), LoraConfig.from_pretrained(str(folder))
    modules = [name for name, _ in model.named_modules() if name]

    if ours.is_pattern and ours.targets != (NO_LAYERS,):
        config.target_modules = exactly(name for name in modules if matches(ours.targets[0], name))
    if ours.is_excluded_by_pattern:
        config.exclude_modules = exactly(name for name in modules if matches(ours.excluded[0], name))
    config.rank_pattern = _by_names({name: ours.rank_of(name) for name in modules}, ours.rank)
    config.alpha_pattern = _by_names({name: ours.alpha_of(name) for name in modules}, ours.alpha)
    return config


def _by_names(values: dict[str, _Value], default: _Value) -> dict[str, _Value]:
    """Return a pattern of the names of each value but the default."""
    names: dict[_Value, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(name)
    # PEFT puts a pattern behind `(.*\.)?`: without the ^ it would match longer names, too.
    return {f"^{exactly(found)}": value for value, found in names.items()}


def exactly(names: Iterable[str]) -> str:
    """Return a regular expression of these dotted names and no others, which Python's engine matches in linear time."""
    return _of_parts(sorted(name.split(".") for name in names)) or "(?!)"


def _of_parts(names: list[list[str]]) -> str:
    branches = []
    for first, group in groupby(names, key=lambda parts: parts[0]):
        rests = [parts[1:] for parts in group]
        longer = [rest for rest in rests if rest]
        tail = rf"\.{_of_parts(longer)}" if longer else ""
        branches.append(re.escape(first) + (f"(?:{tail})?" if len(longer) < len(rests) and tail else tail))
    return f"(?:{'|'.join(branches)})" if branches else ""
