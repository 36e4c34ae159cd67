"""Checks of `adapterhub train --launch`, made before it starts processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter
    from train.distributed.launch import Launch
    from train.distributed.world import Shards
    from train.recipe import Recipe


def launch_training(
    recipe: Recipe,
    output: Path,
    *,
    start: Adapter | None,
    arguments: Sequence[str],
    launch: Launch,
    shards: Shards | None,
) -> None:
    """Start the workers of `launch` with `arguments`, which shard the base as `shards` says.

    Raises UsageError, OutputNotFresh, TrainingFailed, TrainingStopped.
    """
    from train.distributed.launch import run
    from train.loop.run_folder import check_fresh, kept_on_disk
    from train.planning.unsupported import check_distributed
    from train.worker import check_same_run

    check_distributed(recipe, shards=shards)
    check_fresh(output)
    check_same_run(recipe, output, start)
    again = "Run the same command again to resume."
    run(launch, arguments, kept=lambda: kept_on_disk(output, resume=again))
