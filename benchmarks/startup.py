"""Measure how long a command takes to start, against Python itself and the commands of pip and huggingface_hub.

    nice -n -10 .venv/bin/python benchmarks/startup.py [--rounds 20]

Each command is a new process with an empty ADAPTERHUB_HOME. The commands take turns, after one unmeasured round that
fills the file cache. The output is the median and the range of the wall-clock time, the processor time (user and
system), which other programs disturb less, and the ratio of the latter to `python -c pass`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "adapterhub --help": (BIN / "adapterhub", "--help"),
    "adapterhub list": (BIN / "adapterhub", "list"),
    "adapterhub base list": (BIN / "adapterhub", "base", "list"),
    "pip --version": (sys.executable, "-m", "pip", "--version"),
    "hf --help": (BIN / "hf", "--help"),
}


@dataclass
class Times:
    """The runs of one command."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def ms(self) -> tuple[float, float, float, float]:
        """Median, minimum and maximum wall-clock time and median processor time, in milliseconds."""
        wall = self.wall_s
        return 1e3 * statistics.median(wall), 1e3 * min(wall), 1e3 * max(wall), 1e3 * statistics.median(self.cpu_s)


def measure(rounds: int, home: str) -> dict[str, Times]:
    """Run every command once per round, in turn. Raises CalledProcessError for a command that fails."""
    environment = os.environ | {"ADAPTERHUB_HOME": home}
    found = {name: Times() for name in COMMANDS}
    for number in range(rounds + 1):
        for name, command in COMMANDS.items():
            wall, cpu = time.perf_counter(), _children_cpu_s()
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            if number:
                found[name].wall_s.append(time.perf_counter() - wall)
                found[name].cpu_s.append(_children_cpu_s() - cpu)
    return found


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as home:
        found = measure(rounds, home)
    print(f"{rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| command | median, ms | min-max, ms | processor time, ms | its ratio to `python -c pass` |")
    print("|---|---|---|---|---|")
    bare = found["python -c pass"].ms[3]
    for name, times in found.items():
        middle, low, high, cpu = times.ms
        print(f"| `{name}` | {middle:.0f} | {low:.0f}-{high:.0f} | {cpu:.0f} | {cpu / bare:.1f} |")


if __name__ == "__main__":
    main()
