"""Verbs on the local registry: add, list, resolve, remove, and the aliases: promote, rollback, history, diff."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import (
    AsJson,
    HubUrl,
    hub_at,
    registry,
    replay_probe,
    resolved,
    say,
    table,
    until_interrupted,
)
from adapterhub.units import format_bytes

Expect = Annotated[
    str | None,
    typer.Option(metavar="DIGEST", help="Only if the alias leads there now (or: nothing); else nothing is moved."),
]
AnyRef = Annotated[str, typer.Argument(help="Any way to name an adapter.")]


@app.command()
def add(
    folder: Annotated[Path, typer.Argument(help="A packed adapter folder.")],
    name: Annotated[str | None, typer.Option(help="Name to keep it under [default: the manifest's].")] = None,
) -> None:
    """Keep a package in the local registry."""
    from adapterhub.package.layout import open_adapter

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
                "digest": entry.digest if as_json else entry.digest[:19],
                "rank": entry.about.rank,
                "base": entry.about.base,
                "origin": entry.origin if as_json else entry.origin.partition(" ")[0],
            }
            for entry in registry().list()
            if base in (None, entry.about.base)
        ]
    table(rows, as_json, empty="no adapters: train, add or pull one")


@app.command()
def search(
    text: Annotated[str, typer.Argument(help="Part of a name.")] = "",
    base: Annotated[str | None, typer.Option("--base", help="Of this base: its Hub id or fingerprint.")] = None,
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="URL", help="Search this Hub instead of this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find adapters by name and by base."""
    if hub is not None:
        found = [(one.name, one.revision, one.base or "") for one in hub_at(hub).search(base=base)]
    else:
        found = [
            (entry.name, entry.revision, entry.about.base)
            for entry in registry().list()
            if base is None
            or base == entry.about.base
            or (base[:4] == "fp1:" and entry.about.fingerprint.startswith(base))
        ]
    rows = [
        {"name": name, "revision": revision if as_json else revision[:12], "base": of}
        for name, revision, of in found
        if text.lower() in name.lower()
    ]
    table(rows, as_json, empty="nothing found")


@app.command()
def watch(
    name: Annotated[list[str] | None, typer.Argument(help="Names to watch [default: all].")] = None,
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Between two looks.", min=0.05)] = 1.0,
) -> None:
    """Print each move of names and aliases as it happens, a JSON object a line."""
    say("watching; Ctrl+C ends")
    with until_interrupted():
        for called, move in registry().watch(name or (), every_s=every):
            typer.echo(json.dumps({"name": called, **move.model_dump(mode="json")}))


@app.command()
def resolve(ref: AnyRef, hub: HubUrl = None) -> None:
    """Print the digest and the folder a reference leads to, asking the Hub for what is not here."""
    from adapterhub.adapter import AdapterRef

    adapter = registry(hub_at(hub)).resolve(AdapterRef.parse(ref))
    typer.echo(f"{adapter.digest} {adapter.path}")


@app.command()
def promote(
    ref: Annotated[
        str, typer.Argument(metavar="NAME@REVISION", help="A revision, an alias, a commit, or sha256:<8 or more>.")
    ],
    alias: Annotated[str, typer.Argument(help="What it is to be called as well: production, stable, ...")],
    expect: Expect = None,
) -> None:
    """Let an alias of a name lead to one of its adapters."""
    from adapterhub.adapter import AdapterRef

    moved = registry().promote(AdapterRef.parse(ref), alias, expect=expect, prove=lambda one: replay_probe(one, None))
    say(f"{alias}: {moved.before or 'nothing'} -> {moved.after}")
    typer.echo(moved.after)


@app.command()
def rollback(name: str, alias: str, expect: Expect = None) -> None:
    """Let an alias lead again where it led before."""
    moved = registry().rollback(name, alias, expect=expect)
    say(f"{alias}: {moved.before} -> {moved.after}")
    typer.echo(moved.after)


@app.command()
def history(name: str, as_json: AsJson = False) -> None:
    """Every move of a name's revisions: who led them where, and when."""
    rows = [
        {
            "at": move.at.isoformat(),
            "by": move.by,
            "act": move.act,
            "revision": move.revision,
            "from": move.before if as_json else (move.before or "")[:19],
            "to": move.after if as_json else (move.after or "")[:19],
        }
        for move in registry().history(name)
    ]
    table(rows, as_json, empty="nothing has happened")


@app.command()
def diff(a: AnyRef, b: AnyRef, as_json: AsJson = False) -> None:
    """What changed from one adapter to another: configuration, provenance, losses, and the update of each layer."""
    from adapterhub.package.diff import difference

    found = difference(resolved(a), resolved(b))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    for title, changes in (("config", found.config), ("provenance", found.provenance), ("metrics", found.metrics)):
        for change in changes:
            typer.echo(f"{title:<11} {change.fact}: {change.before or '-'} -> {change.after or '-'}")
    layers = [layer for layer in found.layers if layer.distance != 0]
    say(f"{len(layers)} of {len(found.layers)} layers differ" if found.layers else "neither adapts a layer")
    rows = [
        {
            "layer": layer.module,
            "norm before": _figure(layer.norm_before),
            "norm after": _figure(layer.norm_after),
            "norm of difference": _figure(layer.distance),
        }
        for layer in layers
    ]
    if rows:
        table(rows, False, empty="")


@app.command()
def remove(ref: Annotated[str, typer.Argument(metavar="NAME[@REVISION]")]) -> None:
    """Forget a revision of a name; its package stays until the next gc."""
    from adapterhub.adapter import AdapterRef
    from adapterhub.errors import UsageError
    from adapterhub.registry.registry import DEFAULT_REVISION

    parsed = AdapterRef.parse(ref)
    if parsed.name is None:
        raise UsageError(f"{ref} is not a name: only names are removed, packages go with `adapterhub gc`.")
    moved = registry().remove(parsed.name, parsed.revision or DEFAULT_REVISION)
    say(f"{parsed.name}@{moved.revision} led to {moved.before}, and is gone")


@app.command()
def gc(
    grace: Annotated[
        float, typer.Option(metavar="DAYS", help="Spare what came, or lost its last name, within so many days.", min=0)
    ] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
) -> None:
    """Take away packages that no name leads to and no running server uses."""
    removed = registry().collect(grace_s=grace * 86_400, is_trial=dry_run)
    for digest in removed.packages:
        typer.echo(digest)
    what = "would go" if dry_run else "are gone"
    say(f"{len(removed.packages)} packages {what}, {format_bytes(removed.num_bytes)}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
