"""Small training runs that tests of several modules start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub.adapter import StoredBase
from adapterhub.run_record import RunEnd, RunStep
from train import objective
from train.progress import Silent
from train.recipe import Recipe, read_recipe
from train.trainer import fit

WEIGHTS = "adapter_model.safetensors"


def make_recipe(folder: Path, *, lines: int = 12, **sections: dict[str, Any]) -> Recipe:
    """A recipe of three steps on questions of our own; `sections` change or add keys."""
    asked = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n + n}{' indeed' * (n % 3)}."},
            ]
        }
        for n in range(lines)
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, asked)))
    raw: dict[str, dict[str, Any]] = {
        "data": {"source": "file", "path": "lines.jsonl", "held_out": 4},
        "lora": {"rank": 4, "dropout": 0.1},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1},
        "quantization": {"compute_dtype": "float32"},
    }
    text = 'name = "mine"\nbase = "smollm2-135m-instruct"\n'
    for name in raw | sections:
        entries = raw.get(name, {}) | sections.get(name, {})
        text += f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items())
    (folder / "mine.toml").write_text(text)
    return read_recipe(folder / "mine.toml")


def run(recipe: Recipe, base: StoredBase, output: Path, **options: Any) -> RunEnd:
    return fit(recipe, base, output, **({"progress": Silent()} | options))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / WEIGHTS))


class Interrupt(Silent):
    """Somebody presses Ctrl-C twice in the first step."""

    def step(self, done: RunStep, *, of: int) -> None:
        raise KeyboardInterrupt


def failing_loss(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def loss(model: Any, row: Any) -> torch.Tensor:
        if error is not None:
            raise error
        return next(p for p in model.parameters() if p.requires_grad).sum() * float("nan")

    monkeypatch.setattr(objective, "row_loss", loss)
