"""How the next adapter learns from feedback: the recipe that command and server share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from adapterhub.adapter import Adapter


class Method(StrEnum):
    dpo = "dpo"
    kto = "kto"
    orpo = "orpo"


@dataclass(frozen=True)
class Improvement:
    """How a candidate is trained from feedback; each default is written here and nowhere else."""

    method: Method = Method.dpo
    steps: int = 20
    batch_size: int = 4
    """comparisons in a step"""
    learning_rate: float = 5e-4
    held_out: float = 0.25
    """share of the questions that is measured on"""

    def recipe(self, adapter: Adapter, *, base: str, store: Path | None = None) -> str:
        """TOML of a run that goes on from `adapter`, on the feedback in `store` (None: this machine's)."""
        # A JSON string is a TOML basic string.
        name, base, start = map(json.dumps, (adapter.manifest.name, base, adapter.digest))
        path = f"path = {json.dumps(str(store.absolute()))}\n" if store else ""
        return (
            f"name = {name}\nbase = {base}\nstart = {start}\n\n"
            f'[data]\nsource = "feedback"\n{path}held_out = {self.held_out}\n\n'
            f"[train]\nsteps = {self.steps}\nbatch_size = {self.batch_size}\nlearning_rate = {self.learning_rate}\n\n"
            f'[preference]\nmethod = "{self.method}"\n'
        )
