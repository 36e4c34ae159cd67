"""Commands that train from recipes: `train` and `recipes`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.options import AsJson, HubUrl, check_host_port, check_nodes, hub_at, resolved, say, show, show_json

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter, StoredBase
    from adapterhub.package.run_record import RunEnd
    from train.distributed.world import Shards
    from train.recipe import Recipe


class TrackerName(StrEnum):
    """Experiment trackers of `--report-to`, each named like the module it needs."""

    TRACKIO = "trackio"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"


def _check_installed(trackers: list[TrackerName] | None) -> list[TrackerName] | None:
    for tracker in trackers or []:
        if find_spec(tracker) is None:
            raise typer.BadParameter(f"{tracker} is not installed. Run: pip install {tracker}")
    return trackers


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE.toml", help="Recipe file, or the name of a shipped recipe.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New folder for the adapter [default: the recipe's name, in this folder]."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="OUTPUT", help="Resume the run in this folder from its last checkpoint."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print a plan (data, loss masks, memory, time, disk, serving) and train nothing."),
    ] = False,
    launch: Annotated[
        int | None,
        typer.Option(
            "--launch", metavar="N", min=1, max=4096, help="Number of training processes on this machine (torchrun)."
        ),
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Shard the base among the processes of --launch (FSDP).")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the shards of a --shard base in host memory between uses.")
    ] = False,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX", callback=check_nodes, help="Number of machines that train together with --launch."
        ),
    ] = "1",
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", callback=check_host_port, help="Address on one machine where all --nodes connect."
        ),
    ] = None,
    report_to: Annotated[
        list[TrackerName] | None,
        typer.Option(
            "--report-to", callback=_check_installed, help="Experiment tracker to send metrics to. Repeatable."
        ),
    ] = None,
    as_json: AsJson = False,
    hub: HubUrl = None,
) -> None:
    """Train an adapter from a recipe.

    The base is frozen in NF4 and LoRA is trained on all linear layers (QLoRA) unless the recipe differs. Also resumes a
    stopped run, and prints the plan of a run.
    """
    _bound_kernel_caches()
    from adapterhub.bases.store import outline_base, pull_base
    from adapterhub.errors import UsageError
    from train.recipe import find_recipe, read_recipe

    if (recipe is None) == (resume is None):
        raise UsageError("expected either a recipe or --resume OUTPUT: give one of them.")
    if offload and not shard:
        raise UsageError("--offload keeps the shards of the base in host memory: give --shard with it.")
    if plan and (launch is not None or shard):
        raise UsageError(
            "--plan plans one process: leave --launch and --shard out; `adapterhub memory --recipe RECIPE --gpus N` "
            "counts several."
        )
    if as_json and not plan:
        raise UsageError("--json is for --plan: a run's figures are in train_log.jsonl.")
    trackers = [tracker.value for tracker in report_to or []]
    if resume is not None:
        if launch is not None:
            raise UsageError("with --launch the same command resumes a stopped run: leave out --resume.")
        if plan:
            raise UsageError("--plan plans a new run: give a recipe instead of --resume.")
        if output is not None:
            raise UsageError("--resume writes to the folder of the stopped run: leave out --output.")
        if shard or nodes != "1" or rendezvous is not None:
            raise UsageError(
                "--resume continues in one process: leave out --shard, --nodes and --rendezvous, or repeat the run's "
                "command with --launch."
            )
        from train.loop.run_folder import read_run

        begun, _ = read_run(resume)
        base = pull_base(begun.base_name, report=say)
        from train import trainer
        from train.reporting.trackers import tracking

        with interrupt_explained(resume), tracking(trackers, begun) as listen:
            end = trainer.resume(resume, base, listen=listen)
        folder = resume
    else:
        from adapterhub.cli.training.feedback_export import feedback_exported
        from train.distributed.launch import Launch
        from train.inputs import with_lora_of
        from train.loop.run_folder import check_fresh
        from train.run import start_of

        if launch is None and (nodes != "1" or rendezvous is not None):
            raise UsageError("--nodes and --rendezvous belong to --launch: give --launch N, or leave them out.")
        workers = None if launch is None else Launch(launch, nodes=nodes, rendezvous=rendezvous)
        if shard and workers is None:
            _check_is_worker()
        shards: Shards | None = ("host" if offload else "device") if shard else None
        path = find_recipe(str(recipe))
        given = read_recipe(path)
        folder = output or Path(given.name)
        if not plan:
            check_fresh(folder)
        # A plan needs no weights, and those of a base may take a hundred gigabytes.
        base = (outline_base if plan else pull_base)(given.base_name, report=say)
        start = start_of(given, lambda ref: resolved(ref, hub_at(hub)))
        # Before the recipe is exported, so that the exported one names the starting adapter's rank and targets.
        given = with_lora_of(given, start)
        with feedback_exported(given, path, folder, start=start, is_plan=plan) as (parsed, path):
            if plan:
                _plan(parsed, base, folder, start, as_json=as_json)
                return
            if workers is not None:
                from adapterhub.cli.training.train_launch import launch_training

                where = ["--shard"] * shard + ["--offload"] * offload + (["--hub", hub] if hub else [])
                where += [word for name in trackers for word in ("--report-to", name)]
                arguments = ["train", str(path), "--output", str(folder), *where]
                launch_training(parsed, folder, start=start, arguments=arguments, launch=workers, shards=shards)
                return
            with interrupt_explained(folder):
                ended = _train_here(parsed, base, folder, start, shards=shards, report_to=trackers)
        if ended is None:
            return
        end = ended
    _say_end(end)
    say(_next(folder))
    show(folder)


@contextmanager
def interrupt_explained(output: Path) -> Iterator[None]:
    """Convert KeyboardInterrupt into TrainingStopped, which reads from the disk what the run into `output` has left."""
    from adapterhub.errors import TrainingStopped
    from train.loop.run_folder import kept_on_disk

    try:
        yield
    except KeyboardInterrupt as error:
        resume = f"Resume with `adapterhub train --resume {output}`."
        raise TrainingStopped(f"interrupted: {kept_on_disk(output, resume=resume)}") from error


def _next(folder: Path) -> str:
    """Return the next step for the result of a run; not every method writes an adapter."""
    from adapterhub.package.run_record import RECIPE_NAME
    from train.recipe import read_recipe

    method = read_recipe(folder / RECIPE_NAME).method
    if method == "full":
        return f"next: adapterhub serve --base {folder if folder.is_absolute() else f'./{folder}'} (a full model)"
    if method in ("prompt", "prefix"):
        return f"next: PeftModel.from_pretrained(base, {str(folder)!r}); soft prompts cannot be packed"
    return f"next: adapterhub pack {folder}"


def _plan(recipe: Recipe, base: StoredBase, folder: Path, start: Adapter | None, *, as_json: bool) -> None:
    from train.planning.plan import make_plan

    planned = make_plan(recipe, base, folder, start=start)
    if as_json:
        show_json(planned.model_dump(mode="json"))
    else:
        from adapterhub.cli.training.train_plan_view import print_plan

        print_plan(planned)


def _train_here(
    recipe: Recipe,
    base: StoredBase,
    folder: Path,
    start: Adapter | None,
    *,
    shards: Shards | None,
    report_to: list[str],
) -> RunEnd | None:
    """Train in this process, one of several or alone. Return None when another process writes the adapter."""
    from train.distributed.world import is_worker
    from train.worker import run_worker

    if is_worker():
        return run_worker(recipe, base, folder, start=start, shards=shards, report_to=report_to)
    from train import trainer
    from train.reporting.trackers import tracking

    with tracking(report_to, recipe) as listen:
        return trainer.train(recipe, base, folder, start=start, listen=listen)


def _check_is_worker() -> None:
    """Refuse --shard in a process that --launch did not start. Raises UsageError."""
    from adapterhub.errors import UsageError
    from train.distributed.world import is_worker

    if not is_worker():
        raise UsageError("--shard divides the base among processes: give --launch N with it.")


def _bound_kernel_caches() -> None:
    """Limit oneDNN's caches of compiled kernels to the shapes of a step or two; call before torch is imported.

    Rows of different lengths have different shapes. On SmolLM2 the default of 1,024 entries took 240 MB more after 24
    steps (measured).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def _say_end(end: RunEnd) -> None:
    for evaluation in end.evaluations:
        say(
            f"held-out loss on {evaluation.data}: {evaluation.base_loss:.3f} (base) -> {evaluation.adapter_loss:.3f} "
            f"over {evaluation.tokens} tokens"
        )
        if tuned := evaluation.preference:
            say(
                f"{tuned.method.upper()} on {tuned.pairs} held-out pairs: the chosen reply is likelier in "
                f"{tuned.accuracy_before:.0%} -> {tuned.accuracy_after:.0%}; loss {tuned.loss_before:.3f} -> "
                f"{tuned.loss_after:.3f}"
            )
