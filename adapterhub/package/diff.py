"""What changed between two adapters: configuration, provenance, measured losses, and the update of each layer.

The only module of this folder that reads tensors of two packages; loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.adapter import Adapter
from adapterhub.package.lora_config import WEIGHTS_NAME, LoraConfig, lora_tensors, read_lora_config
from adapterhub.package.safetensors_header import read_header

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Change:
    """One fact that is not the same, as text; None: it is not there at all."""

    fact: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class LayerChange:
    """One layer's update: scaling · B A, or the full weight of a module in PEFT's modules_to_save."""

    module: str
    norm_before: float | None
    """Frobenius norm; None: the layer is not adapted."""
    norm_after: float | None
    distance: float | None
    """Norm of the difference of the updates; None: their shapes differ, or one is missing."""


@dataclass(frozen=True)
class Difference:
    """The differences of two adapters."""

    before: str
    """Digest of the first adapter."""
    after: str
    config: tuple[Change, ...]
    provenance: tuple[Change, ...]
    metrics: tuple[Change, ...]
    layers: tuple[LayerChange, ...]
    """Every layer that either of them adapts, sorted by name."""


def difference(before: Adapter, after: Adapter) -> Difference:
    """Compare two opened packages. DoRA's magnitudes are not part of the norms."""
    ours, theirs = _Updates(before.path), _Updates(after.path)
    modules = sorted({*ours.modules, *theirs.modules})
    return Difference(
        before=before.digest,
        after=after.digest,
        config=_changes(_config(before), _config(after)),
        provenance=_changes(_provenance(before), _provenance(after)),
        metrics=_changes(_metrics(before), _metrics(after)),
        layers=tuple(_layer(module, ours.read(module), theirs.read(module)) for module in modules),
    )


@dataclass(frozen=True)
class _Update:
    """left [out, r] · right [r, in], or left alone."""

    left: torch.Tensor
    right: torch.Tensor | None

    def dot(self, other: _Update) -> float | None:
        """Return the Frobenius inner product, without forming either product; None when the shapes differ."""
        if self._shape() != other._shape():
            return None
        if self.right is None or other.right is None:
            return float((self._full() * other._full()).sum())
        return float(((self.left.T @ other.left) * (self.right @ other.right.T)).sum())

    def _shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], (self.left if self.right is None else self.right).shape[1])

    def _full(self) -> torch.Tensor:
        return self.left if self.right is None else self.left @ self.right


class _Updates:
    """The updates of one adapter, read one layer at a time, in fp64."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / WEIGHTS_NAME
        self._config: LoraConfig = read_lora_config(folder)
        self.modules: dict[str, dict[str, str]] = {}
        for tensor in lora_tensors(read_header(self._path), self._config):
            self.modules.setdefault(tensor.module, {})[tensor.kind] = tensor.key

    def read(self, module: str) -> _Update | None:
        from safetensors import safe_open

        keys = self.modules.get(module)
        if keys is None:
            return None
        with safe_open(self._path, framework="pt") as file:
            if "weight" in keys:
                return _Update(file.get_tensor(keys["weight"]).double(), None)
            first = "lora_embedding_" if "lora_embedding_A" in keys else "lora_"
            a, b = (file.get_tensor(keys[f"{first}{half}"]).double() for half in "AB")
            return _Update(self._config.scaling_of(module) * b, a)


def _layer(module: str, before: _Update | None, after: _Update | None) -> LayerChange:
    squares = [None if update is None else update.dot(update) for update in (before, after)]
    together = before.dot(after) if before is not None and after is not None else None
    distance = None
    if together is not None and squares[0] is not None and squares[1] is not None:
        distance = math.sqrt(max(squares[0] + squares[1] - 2 * together, 0.0))
    norms = [None if square is None else math.sqrt(max(square, 0.0)) for square in squares]
    return LayerChange(module, norms[0], norms[1], distance)


def _config(adapter: Adapter) -> dict[str, Any]:
    lora, chat = adapter.manifest.lora, adapter.manifest.chat
    return lora.model_dump(mode="json") | {f"chat.{key}": value for key, value in chat.model_dump(mode="json").items()}


def _provenance(adapter: Adapter) -> dict[str, Any]:
    manifest = adapter.manifest
    facts = {"name": manifest.name, "license": manifest.license}
    facts |= {f"base.{key}": value for key, value in _flat(manifest.base.model_dump(mode="json"))}
    training = manifest.training.model_dump(mode="json") if manifest.training else {}
    return facts | {f"training.{key}": value for key, value in _flat(training)}


def _metrics(adapter: Adapter) -> dict[str, Any]:
    return {
        f"{evaluation.data}: {key}": value
        for evaluation in adapter.manifest.evaluations
        for key, value in _flat(evaluation.model_dump(mode="json", exclude={"data"}))
    }


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _changes(before: dict[str, Any], after: dict[str, Any]) -> tuple[Change, ...]:
    facts = list(dict.fromkeys((*before, *after)))
    return tuple(
        Change(fact, _text(before.get(fact)), _text(after.get(fact)))
        for fact in facts
        if before.get(fact) != after.get(fact)
    )


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else str(value)
