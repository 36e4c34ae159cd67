"""The command `improve`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.options import base_with, check_finite, check_positive, registry, resolved, say, show
from adapterhub.cli.serving.feedback import Store
from adapterhub.feedback.improvement import Improvement, Method

if TYPE_CHECKING:
    from adapterhub.package.run_record import RunEnd


def improve(
    ref: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter that the feedback is about.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder for the candidate [default: ./NAME-improved].")
    ] = None,
    method: Annotated[Method, typer.Option(help="Preference loss to train with.")] = Method.dpo,
    steps: Annotated[int, typer.Option(min=1, max=10_000_000, help="Number of optimizer steps.")] = Improvement.steps,
    batch_size: Annotated[
        int, typer.Option(min=1, max=65_536, help="Preference pairs per optimizer step.")
    ] = Improvement.batch_size,
    learning_rate: Annotated[
        float, typer.Option(callback=check_positive, help="Peak learning rate, reached after the warm-up.")
    ] = Improvement.learning_rate,
    held_out: Annotated[
        float,
        typer.Option(min=0.05, max=0.9, callback=check_finite, help="Fraction of the prompts held out for evaluation."),
    ] = Improvement.held_out,
    all_adapters: Annotated[
        bool, typer.Option("--all-adapters", help="Use the feedback about other adapters, too.")
    ] = False,
    store: Store = None,
    promote: Annotated[
        bool | None,
        typer.Option("--promote/--no-promote", help="Point the adapter's name to the candidate [default: ask]."),
    ] = None,
) -> None:
    """Train a candidate from feedback and offer to promote it.

    Only feedback about the adapter counts, by its name or digest. The candidate is compared with it on held-out pairs.
    """
    from adapterhub.adapter import AdapterRef
    from adapterhub.bases.store import name_in_store
    from adapterhub.cli.training.feedback_export import feedback_exported
    from adapterhub.cli.training.train import interrupt_explained
    from adapterhub.errors import AdapterHubError
    from adapterhub.feedback.promotion import Promotion, name_of, names_of, pack_candidate
    from train import trainer
    from train.inputs import with_lora_of
    from train.recipe import Recipe

    adapter = resolved(ref)
    called = AdapterRef.parse(ref).name or name_of(registry(), adapter)
    promotion = Promotion(registry(), called, adapter.digest)
    if promote:
        promotion.check_before_run()
    folder = (output or Path(f"{adapter.manifest.name}-improved")).absolute()
    improvement = Improvement(method, steps, batch_size, learning_rate, held_out, all_adapters)
    base = base_with(adapter.base, None)
    names = [called, *names_of(registry(), adapter)]
    text = improvement.recipe(adapter, base=name_in_store(base.ref) or base.ref.id, names=names, store=store)
    wanted = Recipe.model_validate(tomllib.loads(text))
    with feedback_exported(with_lora_of(wanted, adapter), folder, folder) as (recipe, _), interrupt_explained(folder):
        end = trainer.train(recipe, base, folder, start=adapter)
    candidate = pack_candidate(folder, base=base, start=adapter, report=say)
    is_better = _report_result(end)
    say(f"{adapter.digest} -> {candidate.digest}")
    if promote is None:
        try:
            promotion.check(candidate)
        except AdapterHubError as error:
            say(f"{called} cannot be moved to the candidate: {error}")
        else:
            promote = typer.confirm(f"Point {called} to the candidate?", default=is_better, err=True)
    if promote:
        promotion.move(candidate)
        say(f"{called} points to the candidate; before, it pointed to {adapter.digest}")
    show(folder)


def _report_result(end: RunEnd) -> bool:
    """Print how the candidate did on held-out pairs. Return whether it did better than the adapter."""
    tuned = next((one.preference for one in end.evaluations if one.preference), None)
    if tuned is None:
        say("no pairs were held out, so the candidate was not evaluated. Compare it in the arena.")
        return False
    say(
        f"on {tuned.pairs} held-out pairs the chosen answer is more likely than the rejected one in "
        f"{tuned.accuracy_before:.0%} -> {tuned.accuracy_after:.0%}; {tuned.method.upper()} loss "
        f"{tuned.loss_before:.3f} -> {tuned.loss_after:.3f}"
    )
    return tuned.accuracy_after > tuned.accuracy_before
