"""Verbs that train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import AsJson, HubUrl, find_recipe, hub_at, resolved, say

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter, StoredBase
    from adapterhub.package.run_record import RunEnd
    from train.distributed.world import Shards
    from train.recipe import Recipe


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE.toml", help="A recipe file, or the name of a shipped one.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A fresh folder [default: ./ and the recipe's name].")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="OUTPUT", help="Go on with the run that was stopped there.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="A full dry run: data, masks, memory, time, disk, serving. Trains nothing.")
    ] = False,
    launch: Annotated[
        int | None, typer.Option("--launch", metavar="N", help="Train with N processes on this machine (torchrun).")
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="With --launch: divide the base among the processes (FSDP).")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="With --shard: the parts wait in host memory until their layer computes.")
    ] = False,
    nodes: Annotated[str, typer.Option(help="With --launch: machines, a number or least:most.")] = "1",
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --nodes: where the machines meet.")
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", metavar="TRACKER", help="Also tell trackio, tensorboard or wandb. Repeatable."),
    ] = None,
    as_json: AsJson = False,
    hub: HubUrl = None,
) -> None:
    """Train a QLoRA adapter from a recipe, go on with a run that was stopped, or plan one."""
    _bound_kernel_caches()
    from adapterhub.bases.store import outline_base, pull_base
    from adapterhub.errors import UsageError
    from train.recipe import read_recipe

    if (recipe is None) == (resume is None):
        raise UsageError("expected either a recipe, or --resume and the folder of a stopped run.")
    if offload and not shard:
        raise UsageError("--offload keeps the parts of a divided base in host memory: give --shard with it.")
    if plan and (launch is not None or shard):
        raise UsageError(
            "--plan counts one process: leave --launch and --shard out; `adapterhub memory --recipe RECIPE --gpus N` "
            "counts several."
        )
    if as_json and not plan:
        raise UsageError("--json is for --plan: a run's figures are in train_log.jsonl.")
    if resume is not None:
        if launch is not None:
            raise UsageError("with --launch the same command goes on with a stopped run: leave --resume out.")
        if plan:
            raise UsageError("--plan goes with a recipe, not with --resume.")
        if output is not None:
            raise UsageError("--resume writes the folder the run was started for: leave --output out.")
        if shard or nodes != "1" or rendezvous is not None:
            raise UsageError(
                "--resume goes on in one process: leave --shard, --nodes and --rendezvous out, or give the run's "
                "command again, with --launch."
            )
        from train.loop.run_folder import read_run

        begun, _ = read_run(resume)
        base = pull_base(begun.base_name, report=say)
        from train import trainer
        from train.reporting.trackers import tracking

        with tracking(report_to or [], begun) as listen:
            end = trainer.resume(resume, base, listen=listen)
        folder = resume
    else:
        from adapterhub.cli.training.feedback_export import feedback_exported
        from train.inputs import with_lora_of

        path = find_recipe(str(recipe))
        given = read_recipe(path)
        folder = output or Path(given.name)
        # A plan needs no weights, and a base may be a hundred gigabytes.
        base = (outline_base if plan else pull_base)(given.base_name, report=say)
        start = _start_of(given, hub)
        # Written down before it is read again, so that it says what the adapter to go on from has.
        given = with_lora_of(given, start)
        with feedback_exported(given, path, folder, is_plan=plan) as (parsed, path):
            if plan:
                _plan(parsed, base, folder, start, as_json=as_json)
                return
            if launch is not None:
                from adapterhub.cli.training.train_launch import launch_training

                where = ["--shard"] * shard + ["--offload"] * offload + (["--hub", hub] if hub else [])
                where += [word for name in report_to or [] for word in ("--report-to", name)]
                arguments = ["train", str(path), "--output", str(folder), *where]
                launch_training(
                    parsed, folder, start=start, arguments=arguments, processes=launch, nodes=nodes,
                    rendezvous=rendezvous,
                )  # fmt: skip
                return
            shards: Shards | None = ("host" if offload else "device") if shard else None
            ended = _train_here(parsed, base, folder, start, shards=shards, report_to=report_to or [])
        if ended is None:
            return
        end = ended
    _say_end(end)
    say(_next(folder))
    typer.echo(folder)


def _next(folder: Path) -> str:
    """What to do with a result: not every method makes an adapter."""
    from adapterhub.package.run_record import RECIPE_NAME
    from train.recipe import read_recipe

    method = read_recipe(folder / RECIPE_NAME).method
    if method == "full":
        return f"next: adapterhub serve --base {folder if folder.is_absolute() else f'./{folder}'} (a whole model)"
    if method in ("prompt", "prefix"):
        return f"next: PeftModel.from_pretrained(base, {str(folder)!r}); a soft prompt is not packed"
    return f"next: adapterhub pack {folder}"


def _plan(recipe: Recipe, base: StoredBase, folder: Path, start: Adapter | None, *, as_json: bool) -> None:
    from train.planning.plan import make_plan

    planned = make_plan(recipe, base, folder, start=start)
    if as_json:
        typer.echo(planned.model_dump_json(indent=1))
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
    """In this process, which may be one of several; None when another one of them writes the adapter."""
    from adapterhub.errors import UsageError
    from train.distributed.world import is_worker
    from train.worker import run_worker

    if is_worker():
        return run_worker(recipe, base, folder, start=start, shards=shards, report_to=report_to)
    if shards:
        raise UsageError("--shard divides the base among processes: give --launch N with it.")
    from train import trainer
    from train.reporting.trackers import tracking

    with tracking(report_to, recipe) as listen:
        return trainer.train(recipe, base, folder, start=start, listen=listen)


def _bound_kernel_caches() -> None:
    """Before torch loads: compiled products are kept for the shapes of a step or two, not for 1,024 as they come.

    Rows of every length are shapes of their own: on SmolLM2 the rest took 240 MB after 24 steps (measured).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def _start_of(recipe: Recipe, hub: str | None) -> Adapter | None:
    """The adapter the recipe goes on from; a folder is relative to the recipe."""
    if recipe.start is None:
        return None
    from adapterhub.adapter import AdapterRef
    from adapterhub.files import expanded
    from adapterhub.package.layout import open_adapter

    folder = AdapterRef.parse(recipe.start).folder
    if folder is not None:
        return open_adapter(recipe.folder / expanded(folder))
    return resolved(recipe.start, hub_at(hub))


def _say_end(end: RunEnd) -> None:
    for evaluation in end.evaluations:
        say(
            f"held-out loss on {evaluation.data}: {evaluation.base_loss:.3f} (base) -> {evaluation.adapter_loss:.3f} "
            f"over {evaluation.tokens} tokens"
        )
        if tuned := evaluation.preference:
            say(
                f"{tuned.method.upper()} on {tuned.pairs} held-out pairs: the better reply is likelier in "
                f"{tuned.accuracy_before:.0%} -> {tuned.accuracy_after:.0%}; loss {tuned.loss_before:.3f} -> "
                f"{tuned.loss_after:.3f}"
            )
