"""Checks of this machine, and how to fix what is missing. Imports no torch and waits briefly for the Hub."""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from adapterhub import extras
from adapterhub.bases.store import list_bases
from adapterhub.errors import AdapterHubError
from adapterhub.paths import home
from adapterhub.units import format_bytes

Status = Literal["ok", "warn", "fail"]
HUB_WAIT_S = 2.0
_LEAST_DISK_BYTES = 2 << 30
_LEAST_MEMORY_BYTES = 4 << 30
_PUBLIC_HUB = "https://huggingface.co"
_OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Finding:
    """The result of one check. Without a `fix` there is nothing to do."""

    check: str
    status: Status
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Run every check; return the findings in reading order."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python, _packages, _processor, _compiler, _accelerator, _memory, _home, _disk, _bases, _hub, _browser,
    )  # fmt: skip
    return [check() for check in checks]


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info < _OLDEST_PYTHON:
        return Finding("python", "fail", found, "install Python 3.11 or newer and run `make setup` with it.")
    return Finding("python", "ok", f"{found} ({sys.executable})")


def _packages() -> Finding:
    """Check that the core and the extras of pyproject.toml are installed; an extra may be left out on purpose."""
    absent, outdated = extras.unmet(extras.requirements())
    incomplete = []
    for extra in extras.PARTS:
        missing, old = extras.unmet(extras.requirements(extra))
        outdated += [one for one in old if one not in outdated]
        incomplete += [extra] if missing else []
    if faults := [*absent, *outdated]:
        return Finding("packages", "fail", f"missing: {', '.join(faults)}", "run `make setup`, or `pip install -e .`.")
    if incomplete:
        names = ",".join(incomplete)
        return Finding(
            "packages", "warn", f"without {', '.join(incomplete)}", f"run `pip install 'adapterhub[{names}]'`."
        )
    shown = ("torch", "transformers", "peft", "bitsandbytes")
    return Finding("packages", "ok", ", ".join(f"{name} {version(name)}" for name in shown))


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    wide = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), None)
    found = f"{cores} cores, {platform.machine()}{f', {wide}' if wide else ''}"
    if flags and wide is None:
        return Finding(
            "processor", "warn", found, "serving is slow without AVX2, AVX-512 or NEON: use another machine if you can."
        )
    return Finding("processor", "ok", found)


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if found is None:
        return Finding(
            "C compiler",
            "warn",
            "none",
            "install gcc or clang: without a compiler, serving on a CPU is several times slower.",
        )
    return Finding("C compiler", "ok", found)


def _accelerator() -> Finding:
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        try:
            built = version("torch")
        except PackageNotFoundError:
            return Finding("GPU", "warn", "NVIDIA, but no torch", "run `TORCH=cuda make setup`.")
        if built.endswith("+cpu"):
            return Finding(
                "GPU", "warn", f"NVIDIA, but torch {built}", "run `TORCH=cuda make setup` for a torch that uses it."
            )
        return Finding("GPU", "ok", "NVIDIA")
    return Finding(
        "GPU",
        "warn",
        "none: computing on the CPU",
        "small models need none; run `adapterhub memory` for what a model needs.",
    )


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Finding("memory", "ok", "unknown here")
    found = format_bytes(total)
    if total < _LEAST_MEMORY_BYTES:
        return Finding("memory", "warn", found, "close other programs: the demo's training takes about 2 GB.")
    return Finding("memory", "ok", found)


def _home() -> Finding:
    folder = home()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("home", "fail", f"{folder} cannot be written", "set ADAPTERHUB_HOME to a folder that can.")
    return Finding("home", "ok", str(folder))


def _disk() -> Finding:
    folder = home()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    found = f"{format_bytes(free)} free"
    if free < _LEAST_DISK_BYTES:
        return Finding("disk", "warn", found, "free some space, or set ADAPTERHUB_HOME to a folder on another disk.")
    return Finding("disk", "ok", found)


def _bases() -> Finding:
    try:
        found = [stored.ref.id for name, stored in list_bases()]
    except AdapterHubError as error:
        return Finding("bases", "fail", str(error), "delete that folder and run `adapterhub base pull` again.")
    if not found:
        return Finding("bases", "warn", "none yet", "adapterhub base pull smollm2-135m-instruct")
    return Finding("bases", "ok", ", ".join(found))


def _hub() -> Finding:
    url = os.environ.get("HF_ENDPOINT") or _PUBLIC_HUB
    if os.environ.get("HF_HUB_OFFLINE"):
        return Finding("hub", "warn", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to push and pull.")
    said = ["in time"]
    # In a thread, since a name lookup has no time limit.
    asking = threading.Thread(target=lambda: said.append(_trouble_with(url)), daemon=True)
    asking.start()
    asking.join(HUB_WAIT_S)
    if said[-1]:
        fix = "check the network and the proxy, or run a Hub of your own: `adapterhub hub serve`, then --hub URL."
        return Finding("hub", "warn", f"{url} does not answer ({said[-1]})", fix)
    return Finding("hub", "ok", url)


def _trouble_with(url: str) -> str:
    """Return why the Hub cannot be reached; an empty text if it answers, even with a refusal."""
    try:
        with urllib.request.urlopen(f"{url}/api/models?limit=1", timeout=HUB_WAIT_S):  # noqa: S310 (the user's own URL)
            return ""
    except urllib.error.HTTPError as error:
        # A proxy also answers for a Hub that it cannot reach.
        return f"status {error.code}" if error.code >= 500 or error.code == 407 else ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error))


def _browser() -> Finding:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        return Finding(
            "browser", "warn", "no Chromium", "only the page's tests need one: run scripts/browser.sh to install it."
        )
    return Finding("browser", "ok", found)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
