"""Build the C kernels with AddressSanitizer and UBSan for every instruction set, and run their tests.

Other machines than Arm also build them for Arm and run them under qemu; with clang they are also built without OpenMP.
Builds that this machine cannot execute are only compiled. A missing compiler is reported and is not a failure.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from serve.local_engine.cpu.build import LEVELS, can_run

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "serve" / "local_engine" / "cpu" / "csrc"
SOURCES = [*sorted(CSRC.glob("*.c")), ROOT / "tests" / "csrc" / "check_kernels.c"]
FLAGS = (
    "-g", "-std=gnu11", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    f"-I{CSRC}",
)  # fmt: skip
SANITIZERS = ("-O1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PACKAGES = {"aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross", "qemu-aarch64": "qemu-user"}
"""Command -> Debian packages that provide it."""


@dataclass(frozen=True)
class Check:
    title: str
    build: tuple[str, ...]
    run: tuple[str, ...] | None
    """Command to run the program with; None: it cannot run here."""


def checks() -> list[Check]:
    """Return the builds that are possible here."""
    machine = platform.machine()
    found = [
        Check(f"{level}, sanitizers", ("cc", *SANITIZERS, flag), () if can_run(level) else None)
        for level, flag in LEVELS.get(machine, {}).items()
    ]
    if shutil.which("clang"):
        found.append(Check("clang without OpenMP", ("clang", "-O1", "-march=native"), ()))
    if machine != "aarch64" and all(map(shutil.which, PACKAGES)):
        # No AddressSanitizer under qemu; what is undefined traps.
        arm = ("-O2", "-static", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-march=armv8-a")
        found.append(Check("NEON under qemu", ("aarch64-linux-gnu-gcc", *arm), ("qemu-aarch64",)))
    return found


def install() -> None:
    """Install Debian's cross compiler and qemu if they are missing and can be installed."""
    missing = [packages for command, packages in PACKAGES.items() if not shutil.which(command)]
    if not missing or platform.machine() == "aarch64":
        return
    if shutil.which("apt-get") and os.getuid() == 0:
        print("installing a cross compiler for Arm and qemu for the kernels' tests", flush=True)
        names = [name for packages in missing for name in packages.split()]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *names]):
            subprocess.run(["apt-get", *command], env=environment, **quiet)
    if not all(map(shutil.which, PACKAGES)):
        print(f"NO ARM: not checked there; install {' '.join(missing)} to do so.", file=sys.stderr)


def run(check: Check) -> str | None:
    """Build and run one check; return None if it passed, else its output."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/check"
        commands = [[*check.build, *FLAGS, *map(str, SOURCES), "-o", program, "-lm"]]
        if check.run is not None:
            commands.append([*check.run, program])
        for command in commands:
            # Two threads, so that rows are shared out.
            environment = {**os.environ, "OMP_NUM_THREADS": "2"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                return f"status {done.returncode}\n{done.stdout}{done.stderr}"
    print(f"{check.title}: {done.stdout.strip() if check.run is not None else 'compiled; cannot run here'}", flush=True)
    return None


def main() -> None:
    install()
    todo = checks()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(zip(todo, pool.map(run, todo), strict=True))
    failed = [f"{check.title}: {said}" for check, said in results if said is not None]
    sys.exit("\n".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
