"""Verbs on the local registry: add, list, resolve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub.cli.app import app
from adapterhub.cli.shared import (
    AsJson,
    HubUrl,
    hub_at,
    registry,
    resolved,
    table,
)


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="A packed adapter folder.")],
    name: Annotated[str | None, typer.Option(help="Name to keep it under [default: the manifest's].")] = None,
) -> None:
    """Keep a package in the local registry."""
    from adapterhub.package import open_adapter

    adapter = registry().add(open_adapter(folder), name=name)
    typer.echo(adapter.digest)


@app.command("list")
def list_adapters(
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="URL", help="List a Hub's adapters instead of this machine's.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Only adapters of this base (its Hub id).")] = None,
    as_json: AsJson = False,
) -> None:
    """Adapters in the local registry, or on a Hub."""
    if hub is not None:
        found = hub_at(hub).search(base=base)
        rows: list[dict[str, Any]] = [
            {"name": one.name, "revision": one.revision[:12], "base": one.base} for one in found
        ]
    else:
        rows = [
            {
                "name": entry.name,
                "revision": entry.revision,
                "digest": entry.manifest.digest if as_json else entry.manifest.digest[:19],
                "rank": entry.manifest.lora.rank,
                "base": entry.manifest.base.id,
                "origin": entry.origin if as_json else entry.origin.partition(" ")[0],
            }
            for entry in registry().list()
            if base in (None, entry.manifest.base.id)
        ]
    table(rows, as_json, empty="no adapters: train, add or pull one")


@app.command()
def resolve(ref: Annotated[str, typer.Argument(help="Any way to name an adapter.")], hub: HubUrl = None) -> None:
    """Print the digest and the folder a reference leads to, asking the Hub for what is not here."""
    adapter = resolved(ref, hub_at(hub))
    typer.echo(f"{adapter.digest} {adapter.path}")
