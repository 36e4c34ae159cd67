"""Run one process of a distributed training run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.errors import OutputNotFresh, UsageError
from adapterhub.package.run_record import RunEnd
from train.distributed.world import Shards, World, joined
from train.inputs import with_lora_of
from train.loop.run_folder import read_run, run_path
from train.recipe import Recipe


def work(
    recipe: Recipe, base: StoredBase, output: Path, *, start: Adapter | None, shards: Shards | None,
    report_to: Sequence[str] = (),
) -> RunEnd | None:  # fmt: skip
    """This worker's part of a run into `output`: begun, or after a restart gone on with from its newest checkpoint.

    The first process writes; the others keep their own log and checkpoints in a folder that goes when they end, so
    all take the same path through the same loop. `output` must be on storage that every node sees. Returns None for
    the others. Raises as `fit` does, and UsageError for preference tuning, whose steps are not sums over samples.
    """
    from train import trainer
    from train.loop.progress import Silent
    from train.reporting.trackers import tracking

    if recipe.preference is not None:
        raise UsageError("preference tuning runs in one process: leave --launch out.")
    if recipe.method == "full" and shards:
        raise UsageError("--shard divides frozen weights, and method = full trains them all: leave --shard out.")
    check_same_run(recipe, output, start)
    with joined(shards=shards) as world, _own_folder(output, world) as folder:
        progress = None if world.rank == 0 else Silent()
        with tracking(report_to if world.rank == 0 else (), recipe) as listen:
            if any(run_path(folder).glob("step-*")):
                end = trainer.resume(folder, base, progress=progress, listen=listen)
            else:
                end = trainer.fit(recipe, base, folder, start=start, progress=progress, listen=listen)
    return end if world.rank == 0 else None


def check_same_run(recipe: Recipe, output: Path, start: Adapter | None) -> None:
    """Raises OutputNotFresh when a run of another recipe was stopped at `output`."""
    if not any(run_path(output).glob("step-*")):
        return
    begun, _ = read_run(output)
    if begun.to_toml() != with_lora_of(recipe, start).to_toml():
        raise OutputNotFresh(
            f"{run_path(output)} holds a stopped run of another recipe: name another output, or remove that folder."
        )


@contextmanager
def _own_folder(output: Path, world: World) -> Iterator[Path]:
    """`output` for the first process; for another a scratch folder with a copy of the newest checkpoint."""
    if world.rank == 0:
        world.barrier()  # the others have copied
        yield output
        return
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / output.name
        theirs = run_path(output)
        if theirs.is_dir():
            shutil.copytree(theirs, run_path(own), ignore=shutil.ignore_patterns("lock", ".*.tmp"))
        world.barrier()
        yield own
