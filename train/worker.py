"""Run one process of a distributed training run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.errors import OutputNotFresh, TrainingStopped
from adapterhub.package.run_record import RunEnd
from train import trainer
from train.distributed.world import Shards, World, process_group
from train.inputs import with_lora_of
from train.loop.progress import Silent
from train.loop.run_folder import read_run, run_path
from train.planning.unsupported import check_distributed
from train.recipe import Recipe
from train.reporting.trackers import tracking


def run_worker(
    recipe: Recipe, base: StoredBase, output: Path, *, start: Adapter | None, shards: Shards | None,
    report_to: Sequence[str] = (),
) -> RunEnd | None:  # fmt: skip
    """Run this process's part of a training run into `output`, or resume it from its last checkpoint.

    Only the first process writes `output`, which must be on storage that every node sees. Each other process keeps its
    own log and checkpoints in a temporary folder, so that all processes run the same loop; for these, return None, also
    when the run is stopped.

    Raises what `trainer.train` raises, and UsageError for what only one process can train.
    """
    check_distributed(recipe, shards=shards)
    check_same_run(recipe, output, start)
    with process_group(shards=shards) as world, _own_folder(output, world) as folder:
        progress = None if world.rank == 0 else Silent()
        end = None
        reported = suppress(TrainingStopped) if world.rank else nullcontext()
        with reported, tracking(report_to if world.rank == 0 else (), recipe) as listen:
            if any(run_path(folder).glob("step-*")):
                end = trainer.resume(folder, base, progress=progress, listen=listen)
            else:
                end = trainer.train(recipe, base, folder, start=start, progress=progress, listen=listen)
    return end if world.rank == 0 else None


def check_same_run(recipe: Recipe, output: Path, start: Adapter | None) -> None:
    """Check that a stopped run of `output` has this recipe. Raises OutputNotFresh."""
    if not any(run_path(output).glob("step-*")):
        return
    begun, _ = read_run(output)
    if begun.to_toml() != with_lora_of(recipe, start).to_toml():
        raise OutputNotFresh(
            f"{run_path(output)} holds a stopped run of another recipe: expected this one. Choose another --output, or "
            "remove that folder."
        )


@contextmanager
def _own_folder(output: Path, world: World) -> Iterator[Path]:
    """Yield `output` in the first process, else a temporary folder with a copy of the last checkpoint."""
    if world.rank == 0:
        world.barrier()  # the others have copied
        yield output
        return
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / output.name
        shared = run_path(output)
        if shared.is_dir():
            shutil.copytree(shared, run_path(own), ignore=shutil.ignore_patterns("lock", ".*.tmp"))
        world.barrier()
        yield own
