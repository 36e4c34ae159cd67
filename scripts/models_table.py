"""Write docs/models.md: how each architecture of transformers is trained, packed and served."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "fixtures"))

from architectures import NOT_TINY, causal_lm_types, tiny_config  # noqa: E402

from adapterhub.bases.capabilities import Support, capability_of  # noqa: E402
from adapterhub.files import write_atomic  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """\
# Base models

Every architecture that transformers {version} registers as a causal language model, {counts}

- **trained** *packed*: several samples share a row, and losses and gradients are those of each sample alone. *One a
  row*: each sample is computed by itself, with the same result, in more time.
- **packed**: whether `adapterhub pack` accepts the adapter. Experts whose weights are one tensor are not adapted.
- **served** *batched*: many sequences in one forward pass, with paged attention. *One at a time*: by the model's own
  forward pass and cache. Greedy tokens equal those of `generate` and of PEFT, alone and beside others.

A base with another configuration (another rotary type, other kinds of layers) is checked again at the start of every
training run and server. What is not computed right falls back to one at a time, or is refused by name. Encoders and
encoder-decoders are no chat models.

This page is written by `make docs`. `tests/test_models_table.py` measures the cells of some families on tiny random
models, `make soak` those of all.

| architecture | model type | trained | packed | served |
|---|---|---|---|---|
"""


def trained(support: Support) -> str:
    """Return the cell of how a model type is trained."""
    return {"batched": "packed", "single": "one a row", "refused": f"no: {support.reason}"}[support.mode]


def served(support: Support) -> str:
    """Return the cell of how a model type is served."""
    return {"batched": "batched", "single": "one at a time", "refused": f"no: {support.reason}"}[support.mode]


def cells(model_type: str) -> tuple[str, str, str]:
    """Return the cells trained, packed and served of a model type."""
    if model_type in NOT_TINY:
        return (f"not tested: {NOT_TINY[model_type]}", "", "")
    found = capability_of(tiny_config(model_type))
    return trained(found.train), "" if found.train.mode == "refused" else "yes", served(found.serve)


def page() -> str:
    """Return the text of docs/models.md."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = {model_type: cells(model_type) for model_type in causal_lm_types()}
    numbers = {
        "trained on packed rows": sum(row[0] == "packed" for row in rows.values()),
        "one sample a row": sum(row[0] == "one a row" for row in rows.values()),
        "served batched": sum(row[2] == "batched" for row in rows.values()),
        "one at a time": sum(row[2] == "one at a time" for row in rows.values()),
    }
    counts = ", ".join(f"{number} {what}" for what, number in numbers.items())
    head = HEAD.format(version=__version__, counts=f"{len(rows)} in all:\n{counts}.")
    lines = [
        f"| {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]} | `{model_type}` | {' | '.join(row)} |"
        for model_type, row in rows.items()
    ]
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_atomic(PAGE, page())
