"""How `adapterhub train --launch` checks what it was given before it starts processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter
    from train.recipe import Recipe


def launch_training(
    recipe: Recipe,
    output: Path,
    *,
    start: Adapter | None,
    arguments: Sequence[str],
    processes: int,
    nodes: str,
    rendezvous: str | None,
) -> None:
    """Start `processes` workers with `arguments`. Raises UsageError, OutputNotFresh, TrainingFailed,
    TrainingStopped."""
    from adapterhub.errors import UsageError
    from train.distributed.launch import Launch, run
    from train.loop.run_folder import check_fresh
    from train.worker import check_same_run

    if recipe.preference is not None:
        raise UsageError("preference tuning runs in one process: leave --launch out.")
    check_fresh(output)
    check_same_run(recipe, output, start)
    run(Launch(processes, nodes=nodes, rendezvous=rendezvous), arguments)
