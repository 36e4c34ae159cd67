"""The printed form of a training plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from adapterhub.memory.estimate import total
from adapterhub.units import format_bytes, format_duration

if TYPE_CHECKING:
    from train.planning.plan import Plan


def print_plan(plan: Plan) -> None:
    """Print the plan to stdout, in color on a terminal.

    Trained text is green, and in ⟦ ⟧ for logs without color.
    """
    console = Console(highlight=False, soft_wrap=True)

    def line(key: str, value: str) -> None:
        console.print(Text(f"{key:<12}", style="bold") + Text(value))

    line("plan", f"{plan.name}: {plan.method} on {plan.base}, {plan.dtype} on {plan.device}; nothing was trained")
    line("data", plan.data)
    for note in plan.notes:
        line("", f"note: {note}")
    if plan.rows:
        line("rows", f"one sample each ({plan.rows})")
    line("steps", f"{plan.steps} ({plan.tokens:,} tokens in all forward passes)")
    line(
        "time",
        f"{format_duration(plan.seconds.low)} to {format_duration(plan.seconds.high)} on this machine, without loading",
    )
    share = plan.trainable_parameters / plan.parameters
    line("adapter", f"{plan.trainable_parameters:,} trainable parameters ({share:.2%} of {plan.parameters:,})")
    for layer in plan.adapted:
        line("", f"{layer.count} x {layer.name} [{layer.inputs} -> {layer.outputs}]")
    for layers in plan.left_out:
        line("", f"left out: {layers.count} x {layers.name} ({layers.reason})")
    low, high = format_bytes(plan.memory_bytes.low), format_bytes(plan.memory_bytes.high)
    line("memory", f"{format_bytes(total(plan.memory))} ({low} to {high})")
    for item in plan.memory:
        line("", f"{format_bytes(item.size_bytes):>9}  {item.name}")
    disk, after, free = map(format_bytes, (plan.disk_bytes, plan.adapter_bytes, plan.disk_free_bytes))
    line("disk", f"{disk} while it runs, {after} after; {free} free")
    line("hub", f"{plan.hub.endpoint}: {plan.hub.note}")
    if plan.stop:
        line("stop", f"a server ends an answer at {', '.join(map(repr, plan.stop))} too, as the package records")
    for engine in plan.servable:
        line("serving", f"{engine.engine}: {'yes, ' if engine.can_serve else 'no: '}{engine.how}")
    _print_masks(console, plan)
    for problem in plan.problems:
        console.print(Text(f"\nproblem: {problem}", style="bold red"))


def _print_masks(console: Console, plan: Plan) -> None:
    masks = plan.masks
    console.print(f"\nmasks: {masks.summary}", markup=False)
    most = max(bin_.samples for bin_ in masks.lengths)
    for bin_ in masks.lengths:
        bar = "█" * round(30 * bin_.samples / most)
        console.print(f"  to {bin_.up_to:>5} tokens {bin_.samples:>6} {bar}", markup=False)
    for number, row in enumerate(masks.rows, start=1):
        shown = Text().append(f"\nsample {number} (trained: ⟦...⟧)\n", "bold")
        for span in row:
            shown.append(f"⟦{span.text}⟧" if span.is_trained else span.text, "green" if span.is_trained else "dim")
        console.print(shown)
