"""A training plan and a run as the page shows them. Draws what the API tells, and nothing it does not."""

from __future__ import annotations

import html
from typing import Any

from serve.ui.render.plots import loss_plot
from serve.ui.render.tables import facts_table, rows_table, size_text


def plan_html(plan: dict[str, Any]) -> str:
    """What a run would take, and which tokens it would learn from."""
    memory, seconds = plan["memory_bytes"], plan["seconds"]
    facts = {
        "method": f"{plan['method']}, {plan['dtype']} on {plan['device']}",
        "base": plan["base"],
        "data": plan["data"],
        "steps": f"{plan['steps']} ({plan['tokens']:,} tokens)",
        "time": f"{_duration(seconds['low'])} to {_duration(seconds['high'])} on the server's machine",
        "memory": f"{size_text(memory['low'])} to {size_text(memory['high'])}",
        "trained": f"{plan['trainable_parameters']:,} of {plan['parameters']:,} parameters",
        "adapter": f"{size_text(plan['adapter_bytes'])} on disk, {size_text(plan['disk_free_bytes'])} free",
        **{
            engine["engine"]: f"{'yes' if engine['can_serve'] else 'no'}: {engine['how']}"
            for engine in plan["servable"]
        },
    }
    items = [(item["name"], size_text(item["size_bytes"])) for item in plan["memory"]]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in plan["notes"])
    return (
        facts_table(facts)
        + (f"<ul>{notes}</ul>" if notes else "")
        + rows_table(("what", "memory"), items, caption="Memory, item by item")
        + _masks(plan["masks"])
    )


def _masks(masks: dict[str, Any]) -> str:
    """The first samples as the model reads them; what it learns from is marked, the rest dimmed."""
    said = (
        f"{masks['trained_tokens']:,} of {masks['tokens']:,} tokens are trained; {masks['cut']} samples cut; "
        f"the end of the answer is trained in {masks['ends_trained']} of {masks['samples']}."
    )
    rows = "".join(f'<p class="tokens sample">{"".join(map(_piece, row))}</p>' for row in masks["rows"])
    return f"<h2>What it learns from</h2><p>{html.escape(said)}</p>{rows}"


def _piece(piece: dict[str, Any]) -> str:
    text = html.escape(piece["text"])
    return f"<mark>{text}</mark>" if piece["is_trained"] else f'<span class="masked">{text}</span>'


def run_html(run: dict[str, Any]) -> str:
    """Where a run stands, and its loss so far."""
    steps = [(step["step"], step["loss"]) for step in run["steps"]]
    held_out = [(measured["step"], measured["loss"]) for measured in run.get("held_out", ())]
    parts = [f'<span class="status {html.escape(run["status"])}">{html.escape(run["status"])}</span>']
    if steps:
        parts.append(f"step {steps[-1][0]}, loss {steps[-1][1]:.3f}")
    if held_out:
        parts.append(f"held-out loss {held_out[-1][1]:.3f}")
    said = f'<p class="run">{" · ".join(parts)}</p>'
    judged = "".join(f"<p>{html.escape(_verdict(one))}</p>" for one in run.get("evaluations", ()))
    # The last thing the command says of a run that is done is the same verdict.
    message = f"<p>{html.escape(run['message'])}</p>" if run.get("message") and not judged else ""
    return said + message + judged + loss_plot(steps, held_out) + _samples(run.get("sampled") or [])


def _samples(sampled: list[dict[str, Any]]) -> str:
    """The fixed prompts, and what the base and the newest adapter say to them."""
    if not sampled:
        return ""
    first, last = sampled[0], sampled[-1]
    columns = ["prompt", "base" if first["step"] == 0 else f"after step {first['step']}"]
    rows = [[one["prompt"], one["text"]] for one in first["answers"]]
    if last is not first:
        columns.append(f"after step {last['step']}")
        for row, one in zip(rows, last["answers"], strict=False):
            row.append(one["text"])
    return rows_table(columns, rows, caption="Samples")


def _verdict(evaluation: dict[str, Any]) -> str:
    """What the run came to, where nothing was learnt from."""
    tuned = evaluation.get("preference")
    if tuned is not None:
        return (
            f"On {tuned['pairs']} held-out pairs the better reply is the likelier one in "
            f"{tuned['accuracy_before']:.0%} before, {tuned['accuracy_after']:.0%} after."
        )
    return (
        f"Held-out loss on {evaluation['data']}: {evaluation['base_loss']:.3f} for the base, "
        f"{evaluation['adapter_loss']:.3f} with the adapter."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
