"""Find the shape of the model that somebody names: a file, a folder, a well-known name, a base here or on the Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.adapter import BaseName
from adapterhub.bases.checks import read_config, why_not_causal
from adapterhub.bases.store import find_base, outline_base
from adapterhub.errors import AdapterHubError, BaseNotFound, HubError, InvalidRef, UsageError
from adapterhub.memory.counting import meta_model, shape_of_model
from adapterhub.memory.known_shapes import KNOWN_CONFIGS, MODEL_SHAPES, known_name
from adapterhub.memory.model_shape import ModelShape


@dataclass(frozen=True)
class FoundModel:
    """A model's shape, where it is from, and what to know about it."""

    shape: ModelShape
    notes: tuple[str, ...] = ()


def find_model(text: str, *, report: Callable[[str], None] = lambda line: None) -> FoundModel:
    """Return the shape of a config.json, its folder, a base on this machine, a well-known model or a Hub id.

    Only a Hub id that is nowhere else is asked of the Hub, for its config. Raises BaseNotFound for a model that is not
    found, UsageError and BaseUnsupported for a config whose memory is not known.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return _counted(path)
    if path.is_dir():
        return _counted(path / "config.json")
    try:
        named = BaseName.parse(text)
    except InvalidRef:
        named = None
    if named is not None:
        try:
            return _counted(find_base(named).path / "config.json")
        except BaseNotFound:
            pass
    if (known := known_name(text)) is not None:
        return _known(known)
    names = ", ".join((*MODEL_SHAPES, *KNOWN_CONFIGS))
    if named is None or named.folder is not None or "/" not in str(named.name):
        raise BaseNotFound(
            f"{text} is not a base on this machine: expected a config.json, its folder, a Hub id, or one of {names}."
        )
    try:
        return _counted(outline_base(named, report=report).path / "config.json")
    except HubError as error:
        raise BaseNotFound(
            f"{text} is not a base on this machine, and no Hub gave its config: {error} Or give its config.json, its "
            f"folder, or one of {names}."
        ) from error


def _known(name: str) -> FoundModel:
    if name in MODEL_SHAPES:
        return FoundModel(MODEL_SHAPES[name], (f"the sizes are those of {name}",))
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(dict(KNOWN_CONFIGS[name])))
        found = _counted(path)
    return FoundModel(found.shape, (f"the sizes are those of {name}", *found.notes))


def _counted(path: Path) -> FoundModel:
    """Return the shape of a config.json, counted on the model; one without a model_type has LLaMA's architecture."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a config.json: {error}.") from error
    if isinstance(raw, dict) and "model_type" not in raw:
        try:
            return FoundModel(
                ModelShape.from_config(raw), ("the config names no model_type: counted as LLaMA's layers",)
            )
        except KeyError as error:
            raise UsageError(
                f"{path} names no model_type and no {error.args[0]} that is a number: its memory is not known. "
                "Expected the config.json of a model of transformers."
            ) from error
    config = _config(path)
    shape = shape_of_model(meta_model(config))
    notes = []
    if reason := why_not_causal(config):
        notes.append(f"not trained or served here: {reason}")
    if shape.expert_weights:
        active = shape.counted.active if shape.counted else None
        computed = "not known" if active is None else f"{active / 1e9:.3f} billion weights"
        notes.append(
            f"experts: {shape.expert_weights / 1e9:.3f} billion weights, which bitsandbytes leaves in 16 bit; one "
            f"token is computed with {computed} of all"
        )
    return FoundModel(shape, tuple(notes))


def _config(path: Path) -> Any:
    """Return transformers' config of a file, which may have any name."""
    if path.name == "config.json":
        return read_config(path.parent)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        copy = Path(folder) / "config.json"
        copy.write_bytes(path.read_bytes())
        try:
            return read_config(copy.parent)
        except AdapterHubError as error:
            raise type(error)(str(error).replace(str(copy), str(path))) from error
