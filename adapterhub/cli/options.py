"""What several verbs share: options, notes to stderr, tables, and the way from a text to the thing it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter, BaseRef, StoredBase
    from adapterhub.hub.client import Hub
    from adapterhub.registry.registry import Registry

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
HubUrl = Annotated[
    str | None, typer.Option("--hub", metavar="URL", help="The Hub to talk to [default: $HF_ENDPOINT, else public].")
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", metavar="NAME", help="Name a proxy reaches us by; may be repeated."),
]
BaseText = Annotated[str, typer.Option("--base", help="A known base, a Hub id (owner/name[@rev]) or a folder.")]


def say(line: str) -> None:
    """A note for the reader, kept apart from the data."""
    typer.echo(line, err=True)


@contextmanager
def until_interrupted() -> Iterator[None]:
    """A server that is told to stop has not failed."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped")


def hub_at(endpoint: str | None) -> Hub:
    from adapterhub.hub.client import Hub

    return Hub.from_environment(endpoint)


def registry(hub: Hub | None = None) -> Registry:
    from adapterhub.registry.registry import Registry

    return Registry.default(hub)


def resolved(ref: str, hub: Hub | None = None) -> Adapter:
    from adapterhub.adapter import AdapterRef

    parsed = AdapterRef.parse(ref)
    if parsed.name is not None and Path(ref).is_dir():
        say(f"note: {ref} is read as a name; for the folder write ./{ref}")
    return registry(hub).open(parsed)


def find_recipe(named: str) -> Path:
    """Return the path of a recipe file, or of a shipped recipe by its name. Raises RecipeError."""
    from adapterhub.errors import RecipeError
    from train.recipe import shipped_recipes

    path = Path(named)
    if not path.is_file():
        shipped = shipped_recipes()
        if named not in shipped:
            raise RecipeError(f"there is no recipe {named}: expected a file, or one of {', '.join(sorted(shipped))}.")
        path = shipped[named]
    return path


def table(rows: list[dict[str, Any]], as_json: bool, *, empty: str) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif not rows:
        say(empty)
    else:
        widths = {key: max(len(key), *(len(str(row[key] or "-")) for row in rows)) for key in rows[0]}
        typer.echo("  ".join(f"{key.upper():<{width}}" for key, width in widths.items()).rstrip())
        for row in rows:
            typer.echo("  ".join(f"{row[key] or '-'!s:<{width}}" for key, width in widths.items()).rstrip())


def base_with(ref: BaseRef, named: str | None) -> StoredBase:
    """The base the user names, else the one on this machine whose fingerprint is `ref`'s."""
    from adapterhub.adapter import BaseName
    from adapterhub.bases.store import find_base, list_bases, pull_base

    if named is not None:
        return pull_base(BaseName.parse(named), report=say)
    for _, stored in list_bases():
        if stored.ref.fingerprint == ref.fingerprint:
            return stored
    return find_base(BaseName.parse(ref.id))


def replay_probe(adapter: Adapter, base_name: str | None) -> None:
    """Ask the base, with the adapter on it, the recorded prompts; what passed is written down. Raises ProbeMismatch."""
    from adapterhub.bases.loading import load_base
    from adapterhub.errors import ProbeMismatch
    from adapterhub.pack import load_kwargs
    from adapterhub.package.layout import check_base
    from adapterhub.probe import replay

    recorded = adapter.manifest.probe
    if recorded is None:
        raise ProbeMismatch(f"{adapter.manifest.name} carries no probe: pack it again to record one.")
    base = base_with(adapter.base, base_name)
    check_base(adapter, base)
    held = load_kwargs(adapter.manifest.base.quantization) | {"dtype": recorded.dtype}
    replay(load_base(base, purpose="serve", **held), adapter)
    say(f"probe: {len(recorded.answers)} recorded prompts answered as before ({recorded.dtype})")
    registry().record_proof(adapter)
