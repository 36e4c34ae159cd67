"""The recipe that trains a candidate from feedback, shared by the command `improve` and a server."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from adapterhub.adapter import Adapter


class Method(StrEnum):
    """The preference objective of the training run."""

    dpo = "dpo"
    kto = "kto"
    orpo = "orpo"


@dataclass(frozen=True)
class Improvement:
    """The settings of a training run on feedback, with all their defaults."""

    method: Method = Method.dpo
    steps: int = 20
    batch_size: int = 4
    """Preference pairs per optimizer step."""
    learning_rate: float = 5e-4
    held_out: float = 0.25
    """Fraction of the prompts that is held out for evaluation."""
    all_adapters: bool = False
    """Whether to train on the feedback about other adapters, too."""

    def about(self, adapter: Adapter, names: Iterable[str]) -> list[str] | None:
        """Return the names and the digest by which feedback is about `adapter`; None: all feedback counts."""
        return None if self.all_adapters else list(dict.fromkeys([*names, adapter.digest]))

    def recipe(self, adapter: Adapter, *, base: str, names: Iterable[str], store: Path | None = None) -> str:
        """Return the recipe, in TOML, of a run that starts from `adapter` and trains on the feedback in `store`.

        `names` are those that answers of the adapter have in feedback. `store` None stands for this machine's feedback.
        """
        name, base, start = map(_toml, (adapter.manifest.name, base, adapter.digest))
        path = f"path = {_toml(str(store.absolute()))}\n" if store else ""
        adapters = _toml(self.about(adapter, names) or "all")
        return (
            f"name = {name}\nbase = {base}\nstart = {start}\n\n"
            f'[data]\nsource = "feedback"\n{path}adapters = {adapters}\nheld_out = {self.held_out}\n\n'
            f"[train]\nsteps = {self.steps}\nbatch_size = {self.batch_size}\nlearning_rate = {self.learning_rate}\n\n"
            f'[preference]\nmethod = "{self.method}"\n'
        )


def _toml(value: str | list[str]) -> str:
    """Return a TOML value: a JSON string is a TOML basic string unless it escapes half a character."""
    return json.dumps(value, ensure_ascii=False)
