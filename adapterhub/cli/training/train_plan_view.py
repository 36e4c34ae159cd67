"""How a training plan is shown to a person. Computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from train.planning.plan import Plan


def print_plan(plan: Plan) -> None:
    """To stdout, in colour on a terminal; trained text is green and, for eyes and logs without colour, in ⟦ ⟧."""
    console = Console(highlight=False, soft_wrap=True)

    def line(key: str, value: str) -> None:
        console.print(Text(f"{key:<12}", style="bold") + Text(value))

    line("plan", f"{plan.name}: {plan.method} on {plan.base}, {plan.dtype} on {plan.device}; nothing was trained")
    line("data", plan.data)
    for note in plan.notes:
        line("", f"note: {note}")
    line("steps", f"{plan.steps} ({plan.tokens:,} tokens in all forward passes)")
    line("time", f"{_duration(plan.seconds.low)} to {_duration(plan.seconds.high)} on this machine, without loading")
    share = plan.trainable_parameters / plan.parameters
    line("adapter", f"{plan.trainable_parameters:,} trainable parameters ({share:.2%} of {plan.parameters:,})")
    for layer in plan.adapted:
        line("", f"{layer.count} x {layer.name} [{layer.inputs} -> {layer.outputs}]")
    line("memory", f"{_gb(plan.memory_bytes.low)} to {_gb(plan.memory_bytes.high)}")
    for item in plan.memory:
        line("", f"{_gb(item.size_bytes):>9}  {item.name}")
    line(
        "disk",
        f"{_gb(plan.disk_bytes)} while it runs, {_gb(plan.adapter_bytes)} after; {_gb(plan.disk_free_bytes)} free",
    )
    line("hub", f"{plan.hub.endpoint}: {plan.hub.note}")
    if plan.stop:
        line("stop", f"a server ends an answer at {', '.join(map(repr, plan.stop))} too; the package says so")
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
        for piece in row:
            shown.append(f"⟦{piece.text}⟧" if piece.is_trained else piece.text, "green" if piece.is_trained else "dim")
        console.print(shown)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
