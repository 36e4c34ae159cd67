"""Checks of `adapterhub train --launch`, made before it starts processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter
    from train.distributed.launch import Launch
    from train.recipe import Recipe


def launch_training(
    recipe: Recipe,
    output: Path,
    *,
    start: Adapter | None,
    arguments: Sequence[str],
    launch: Launch,
) -> None:
    """Start the workers of `launch` with `arguments`.

    Raises UsageError, OutputNotFresh, TrainingFailed, TrainingStopped.
    """
    from adapterhub.errors import UsageError
    from train.distributed.launch import run
    from train.loop.run_folder import check_fresh
    from train.worker import check_same_run

    if recipe.preference is not None:
        raise UsageError("preference tuning runs in a single process: leave out --launch.")
    check_fresh(output)
    check_same_run(recipe, output, start)
    run(launch, arguments)
