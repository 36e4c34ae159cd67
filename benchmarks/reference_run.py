"""Train the demo's adapters again, plot their losses, and compare memory and time with each run's plan.

    .venv/bin/pip install ".[bench]"
    .venv/bin/python benchmarks/reference_run.py [--only demo-trivia ...] [--draw docs/reference-run.png]

Each recipe is the shipped one with evaluations during the run added, which changes no byte of the adapter. Each is
planned and trained by the command, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = ("demo-trivia", "demo-captain", "demo-coding")
MEASURED = 7
"""Evaluations of the held-out loss during the run."""
COMMAND = [sys.executable, "-P", "-c", "from adapterhub.cli.main import main; main()", "train"]


def run(name: str, place: Path, *, threads: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Plan and train a recipe; return the plan and the run's events."""
    from train.recipe import shipped_recipes

    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    shipped = shipped_recipes()[name]
    planned = subprocess.run(
        [*COMMAND, str(shipped), "--plan", "--json"], env=environment, check=True, capture_output=True, text=True
    )
    plan: dict[str, Any] = json.loads(planned.stdout)
    text = shipped.read_text().replace("[train]\n", f"[train]\nevaluate_every = {-(-plan['steps'] // MEASURED)}\n")
    recipe = place / f"{name}.toml"
    recipe.write_text(text)
    subprocess.run([*COMMAND, str(recipe), "--output", str(place / name)], env=environment, check=True)
    return plan, [json.loads(line) for line in (place / name / "train_log.jsonl").read_text().splitlines()]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3.2), constrained_layout=True, squeeze=False)
    for panel, (name, events) in zip(panels[0], runs.items(), strict=True):
        found = events[-1]["evaluations"][0]
        steps = [event for event in events if event["event"] == "step"]
        measured = [(0, found["base_loss"])]
        measured += [(event["step"], event["loss"]) for event in events if event["event"] == "measured"]
        panel.plot([s["step"] for s in steps], [s["loss"] for s in steps], color="#9bbfe8", label="training")
        panel.plot(*zip(*measured, strict=True), "o-", color="#0b62c4", label="held out")
        panel.axhline(found["base_loss"], color="#888888", linestyle=":", label="base, held out")
        panel.set_title(f"{name}: {found['base_loss']:.2f} to {found['adapter_loss']:.2f}", fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("nats per trained token")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", type=Path, help="where the curves go [default: nowhere]")
    chosen = parser.parse_args()
    logs = {}
    print("| recipe | steps | held-out loss, base -> adapter | steps' seconds, planned | peak memory, planned |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for name in chosen.only:
            plan, events = run(name, Path(place), threads=chosen.threads)
            logs[name], end = events, events[-1]
            found, seconds = end["evaluations"][0], plan["seconds"]
            low, high = (plan["memory_bytes"][side] / 1e9 for side in ("low", "high"))
            print(
                f"| `{name}` | {end['steps']} | {found['base_loss']:.2f} -> {found['adapter_loss']:.2f} | "
                f"{end['seconds']:.0f} s, {seconds['low']:.0f} to {seconds['high']:.0f} s | "
                f"{end['peak_memory_bytes'] / 1e9:.2f} GB, {low:.2f} to {high:.2f} GB |",
                flush=True,
            )
    if chosen.draw:
        draw(logs, chosen.draw)


if __name__ == "__main__":
    main()
