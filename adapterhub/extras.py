"""The extras of the distribution: which of them installs a module, and what is missing here, from its own metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "adapterhub"
PARTS = ("train", "serve", "ui", "hubserver")
"""The extras that are parts of the program; the others are for its developers, or add one thing."""

_DISTRIBUTIONS = {
    "PIL": "pillow",
    "markdown_it": "markdown-it-py",
    "starlette": "fastapi",
    "tokenizers": "transformers",
}
"""Modules that are not called like the distribution in pyproject.toml that brings them."""
_PREFERRED = {"serve": "serve", "page": "ui", "hub": "hubserver", "demo": "all"}
"""Command -> the extra it is named after, where several would bring the module."""


def extra_for(module: str, *, command: Sequence[str]) -> str | None:
    """Return the extra that brings `module` to a command, given by its words; None when no extra does."""
    top = module.partition(".")[0]
    wanted = _DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
    found = [extra for extra in (*PARTS, "all") if wanted in {one.name.lower() for one in requirements(extra)}]
    preferred = _PREFERRED.get(command[0]) if command else None
    return preferred if preferred in found else next(iter(found), None)


def requirements(extra: str = "") -> list[Requirement]:
    """Return what `extra` asks for beyond the core, or, for "", what the core asks for."""
    return list(_walk(extra, set()))


def unmet(wanted: Sequence[Requirement]) -> tuple[list[str], list[str]]:
    """Return (distributions that are not installed, those installed in a version that does not do)."""
    missing, outdated = [], []
    for one in wanted:
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            missing.append(one.name)
            continue
        if not one.specifier.contains(installed, prereleases=True):
            outdated.append(f"{one.name} {one.specifier} (there is {installed})")
    return missing, outdated


def _walk(extra: str, seen: set[str]) -> Iterator[Requirement]:
    from packaging.requirements import Requirement

    seen.add(extra)
    for line in metadata(DISTRIBUTION).get_all("Requires-Dist") or ():
        one = Requirement(line)
        is_core = one.marker is None or one.marker.evaluate({"extra": ""})
        if is_core != (extra == "") or not (one.marker is None or one.marker.evaluate({"extra": extra})):
            continue
        if one.name == DISTRIBUTION:  # an extra made of others
            for other in sorted(one.extras - seen):
                yield from _walk(other, seen)
        else:
            yield one
