"""HTML of a training plan and of a training run, from the API's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from adapterhub.svg_plot import Curve, line_plot
from adapterhub.units import format_bytes, format_duration
from serve.ui.render.tables import bullet_list, facts_table, rows_table, scrollable
from serve.ui.render.templates import render


def plan_html(plan: dict[str, Any]) -> Markup:
    """Return what a run needs, and the first samples with the tokens it learns from marked."""
    memory, seconds = plan["memory_bytes"], plan["seconds"]
    facts = {
        "method": f"{plan['method']}, {plan['dtype']} on {plan['device']}",
        "base": plan["base"],
        "data": plan["data"],
        "steps": f"{plan['steps']} ({plan['tokens']:,} tokens)",
        "time": f"{format_duration(seconds['low'])} to {format_duration(seconds['high'])} on the server's machine",
        "memory": f"{format_bytes(memory['low'])} to {format_bytes(memory['high'])}",
        "trained": f"{plan['trainable_parameters']:,} of {plan['parameters']:,} parameters",
        "adapter": f"{format_bytes(plan['adapter_bytes'])} on disk, {format_bytes(plan['disk_free_bytes'])} free",
        **{
            engine["engine"]: f"{'yes' if engine['can_serve'] else 'no'}: {engine['how']}"
            for engine in plan["servable"]
        },
    }
    items = [(item["name"], format_bytes(item["size_bytes"])) for item in plan["memory"]]
    masks = plan["masks"]
    trained = (
        f"{masks['trained_tokens']:,} of {masks['tokens']:,} tokens are trained; {masks['cut']} samples cut; "
        f"the end of the answer is trained in {masks['ends_trained']} of {masks['samples']}."
    )
    return render(
        "plan",
        facts=facts_table(facts),
        notes=bullet_list(plan["notes"]),
        memory=rows_table(("what", "memory"), items, caption="Memory, item by item"),
        trained=trained,
        samples=masks["rows"],
    )


def run_html(run: dict[str, Any]) -> Markup:
    """Return the status of a run, its loss so far, and its sample answers."""
    steps = [(step["step"], step["loss"]) for step in run["steps"]]
    held_out = [(measured["step"], measured["loss"]) for measured in run.get("held_out", ())]
    figures = []
    if steps:
        figures.append(f"step {steps[-1][0]}, loss {steps[-1][1]:.3f}")
    if held_out:
        figures.append(f"held-out loss {held_out[-1][1]:.3f}")
    results = [_result(evaluation) for evaluation in run.get("evaluations", ())]
    # The last line that the command prints for a completed run is the same result.
    lines = results or [line for line in (run.get("message"),) if line]
    return render(
        "run",
        status="stopping" if run.get("is_stopping") else run["status"],
        figures=figures,
        lines=lines,
        plot=_loss_plot(steps, held_out),
        samples=_samples(run.get("sampled") or []),
    )


def _loss_plot(steps: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> Markup:
    """Return loss (nats per token) over optimizer steps, and dashed on held-out questions; empty before two steps."""
    if len(steps) < 2:
        return Markup()
    (first, at_first), (last, at_last) = steps[0], steps[-1]
    curves = (Curve(steps, "trained", "trained on"), Curve(held_out, "held-out", "held out"))
    label = f"Loss from {at_first:.3f} at step {first} to {at_last:.3f} at step {last}"
    plot = Markup(line_plot(curves, label=label, from_zero=True))  # noqa: S704 -- it escapes its texts
    return scrollable(plot, label="Plot")


def _samples(sampled: list[dict[str, Any]]) -> Markup:
    """Return a table of the fixed prompts with the answers of the base and of the newest adapter."""
    if not sampled:
        return Markup()
    first, last = sampled[0], sampled[-1]
    columns = ["prompt", "base" if first["step"] == 0 else f"after step {first['step']}"]
    rows = [[one["prompt"], one["text"]] for one in first["answers"]]
    if last is not first:
        columns.append(f"after step {last['step']}")
        for row, one in zip(rows, last["answers"], strict=False):
            row.append(one["text"])
    return rows_table(columns, rows, caption="Samples")


def _result(evaluation: dict[str, Any]) -> str:
    """Return the result on held-out data as a sentence."""
    tuned = evaluation.get("preference")
    if tuned is not None:
        return (
            f"On {tuned['pairs']} held-out pairs the chosen reply is more likely in "
            f"{tuned['accuracy_before']:.0%} before, {tuned['accuracy_after']:.0%} after."
        )
    return (
        f"Held-out loss on {evaluation['data']}: {evaluation['base_loss']:.3f} for the base, "
        f"{evaluation['adapter_loss']:.3f} with the adapter."
    )
