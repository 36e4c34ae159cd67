"""The report of a run as one self-contained HTML page: curves, answers, masks, and memory against the plan.

It holds no training text and no script, and fetches nothing, so a package can contain it (docs/adapter-format.md).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

import jinja2
import torch

from adapterhub.bases.loading import LoadedBase
from adapterhub.memory.estimate import Estimate
from adapterhub.package.run_record import (
    REPORT_HEAD,
    RunEnd,
    RunEvent,
    RunMeasured,
    RunSampled,
    RunStart,
    RunStep,
    SampleAnswer,
)
from adapterhub.svg_plot import Curve, bar_plot, line_plot
from adapterhub.units import format_bytes, format_duration
from train.distributed.world import current_world
from train.objectives.base import Objective
from train.objectives.mask_report import mask_report
from train.recipe import Recipe

_SMOOTHING = 0.9
"""Decay of the running mean drawn over the losses of single steps."""


@dataclass(frozen=True)
class Chart:
    """A titled plot."""

    title: str
    svg: str


@dataclass(frozen=True)
class Asked:
    """A fixed prompt and its answers, as (when, text)."""

    prompt: str
    answers: list[tuple[str, str]]


def report(
    recipe: Recipe, events: Sequence[RunEvent], memory: Estimate, objective: Objective, loaded: LoadedBase
) -> str:
    """Return the page of a run whose record is complete; `memory` is the run's plan.

    The same record, data and machine give the same bytes.
    """
    start = next(event for event in events if isinstance(event, RunStart))
    end = next(event for event in events if isinstance(event, RunEnd))
    steps = [event for event in events if isinstance(event, RunStep)]
    masks = mask_report(objective, loaded.tokenizer)
    bars = [(f"to {bin_.up_to} tokens", bin_.samples) for bin_ in masks.lengths]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": format_bytes, "duration": format_duration}
    template = environment.from_string((Path(str(package_files("train.reporting"))) / "report.html.jinja").read_text())
    return REPORT_HEAD + template.render(
        recipe=recipe,
        toml=recipe.to_toml(),
        start=start,
        end=end,
        described=objective.describe(),
        charts=_charts(events),
        asked=_asked(events),
        masks=masks,
        lengths=bar_plot(bars, label="Samples by length"),
        memory=memory,
        tokens_per_second=sum(step.tokens for step in steps) / max(end.seconds, 1e-9),
        environment=_environment(loaded),
    )


def _charts(events: Sequence[RunEvent]) -> list[Chart]:
    losses = [(event.step, event.loss) for event in events if isinstance(event, RunStep)]
    measured = [(event.step, event.loss) for event in events if isinstance(event, RunMeasured)]
    rates = [(event.step, event.learning_rate) for event in events if isinstance(event, RunStep)]
    charts = [_chart("Training loss", Curve(losses, "faint"), Curve(_smoothed(losses), "strong"))]
    if len(measured) > 1:
        charts.append(_chart("Held-out loss", Curve(measured, "strong")))
    return [*charts, _chart("Learning rate", Curve(rates, "strong"))]


def _chart(title: str, *curves: Curve) -> Chart:
    return Chart(title, line_plot(curves, label=f"{title} by step"))


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return a running mean, corrected for its start at zero (as in Adam, arXiv 1412.6980, section 3)."""
    found, mean, weight = [], 0.0, 0.0
    for place, value in points:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        found.append((place, mean / weight))
    return found


def _asked(events: Sequence[RunEvent]) -> list[Asked]:
    rounds: list[tuple[str, list[SampleAnswer]]] = []
    for event in events:
        if isinstance(event, RunSampled):
            rounds.append((f"step {event.step}" if event.step else "base", event.answers))
        elif isinstance(event, RunEnd) and event.answers:
            rounds.append(("result", event.answers))
    if not rounds:
        return []
    return [
        Asked(answer.prompt, [(when, answers[number].text) for when, answers in rounds])
        for number, answer in enumerate(rounds[0][1])
    ]


def _environment(loaded: LoadedBase) -> list[tuple[str, str]]:
    world = current_world()
    facts = [("machine", f"{platform.system()} {platform.machine()}, {_processor()}")]
    facts += [(choice.what, f"{choice.value} ({choice.reason})") for choice in loaded.choices]
    facts.append(("threads", str(torch.get_num_threads())))
    if world.size > 1:
        facts.append(("processes", f"{world.size}{world.sharding}"))
    return facts


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
