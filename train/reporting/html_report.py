"""A run as one HTML page that stands alone: curves, answers, masks, memory against the plan. Holds no training text.

No script, nothing fetched, drawings inline; so it can travel in a package (docs/adapter-format.md).
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
from adapterhub.memory.training import SPREAD
from adapterhub.package.run_record import (
    REPORT_HEAD,
    Answer,
    RunEnd,
    RunEvent,
    RunMeasured,
    RunSampled,
    RunStart,
    RunStep,
)
from train.distributed.world import current_world
from train.objectives.base import Objective
from train.objectives.mask_report import mask_report
from train.planning.plan import MemoryItem
from train.recipe import Recipe

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 240, 52, 28
_SMOOTHING = 0.9
"""of the running mean drawn over the losses of single steps"""


@dataclass(frozen=True)
class Line:
    """A curve in the drawing's own units, as an SVG `points` attribute."""

    kind: str
    points: str


@dataclass(frozen=True)
class Tick:
    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    title: str
    lines: list[Line]
    across: list[Tick]
    up: list[Tick]


@dataclass(frozen=True)
class Asked:
    """A fixed prompt, and its answers after (step, text); step 0 is the bare base."""

    prompt: str
    answers: list[tuple[str, str]]


def report(
    recipe: Recipe, events: Sequence[RunEvent], memory: Sequence[MemoryItem], objective: Objective, loaded: LoadedBase
) -> str:
    """The page of a run whose record is complete, `memory` as planned; bytes follow from these, the data and the
    machine."""
    start = next(event for event in events if isinstance(event, RunStart))
    end = next(event for event in events if isinstance(event, RunEnd))
    steps = [event for event in events if isinstance(event, RunStep)]
    planned = sum(item.size_bytes for item in memory)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(str(package_files("train.reporting"))) / "report.html.jinja").read_text())
    return REPORT_HEAD + template.render(
        recipe=recipe,
        toml=recipe.to_toml(),
        start=start,
        end=end,
        described=objective.describe(),
        charts=_charts(events),
        asked=_asked(events),
        masks=mask_report(objective, loaded.tokenizer),
        memory=memory,
        planned=planned,
        planned_low=planned * (1 - SPREAD),
        planned_high=planned * (1 + SPREAD),
        tokens_per_second=sum(step.tokens for step in steps) / max(end.seconds, 1e-9),
        environment=_environment(loaded),
    )


def _charts(events: Sequence[RunEvent]) -> list[Chart]:
    losses = [(event.step, event.loss) for event in events if isinstance(event, RunStep)]
    measured = [(event.step, event.loss) for event in events if isinstance(event, RunMeasured)]
    rates = [(event.step, event.learning_rate) for event in events if isinstance(event, RunStep)]
    charts = [_chart("Training loss", {"faint": losses, "strong": _smoothed(losses)})]
    if len(measured) > 1:
        charts.append(_chart("Held-out loss", {"strong": measured}))
    return [*charts, _chart("Learning rate", {"strong": rates})]


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean without the pull towards zero at its beginning (as in Adam, arXiv 1412.6980, section 3)."""
    found, mean, weight = [], 0.0, 0.0
    for place, value in points:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        found.append((place, mean / weight))
    return found


def _chart(title: str, curves: dict[str, Sequence[tuple[int, float]]]) -> Chart:
    every = [point for points in curves.values() for point in points]
    last = max(place for place, _ in every)
    first = min(place for place, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    if high - low < 1e-12:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9

    def x(place: float) -> float:
        return round(_LEFT + (place - first) / max(1, last - first) * (_WIDTH - _LEFT - 8), 1)

    def y(value: float) -> float:
        return round(8 + (high - value) / (high - low) * (_HEIGHT - _BOTTOM - 16), 1)

    lines = [Line(kind, " ".join(f"{x(p)},{y(v)}" for p, v in points)) for kind, points in curves.items()]
    across = sorted({first + (last - first) * part // 4 for part in range(5)})
    return Chart(
        title,
        lines,
        [Tick(x(place), str(place)) for place in across],
        [Tick(y(value), f"{value:.2g}") for value in (low + (high - low) * part / 4 for part in range(5))],
    )


def _asked(events: Sequence[RunEvent]) -> list[Asked]:
    rounds: list[tuple[str, list[Answer]]] = []
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
