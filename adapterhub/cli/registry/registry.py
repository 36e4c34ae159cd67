"""Commands on the local registry: its adapters, their names and aliases, and garbage collection."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub.cli.options import (
    AdapterName,
    AnyRef,
    AsJson,
    HubUrl,
    check_expected,
    check_finite,
    check_url,
    hub_at,
    registry,
    replay_probe,
    resolved,
    say,
    show,
    show_json,
    table,
    until_interrupted,
)
from adapterhub.units import format_bytes

Expect = Annotated[
    str | None,
    typer.Option(
        metavar="DIGEST",
        callback=check_expected,
        help="Move the alias only if it points to this digest now ('nothing': only if it does not exist).",
    ),
]


def add(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Package folder, written by `pack`.")],
    name: AdapterName = None,
) -> None:
    """Add a package to the local registry."""
    from adapterhub.package.layout import open_adapter

    adapter = registry().add(open_adapter(folder), name=name)
    show(adapter.digest)


def list_adapters(
    hub: Annotated[
        str | None,
        typer.Option(
            "--hub", metavar="URL", callback=check_url, help="Address of a Hub to list instead of this machine."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="List only adapters for this base model, given as its Hub id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters on this machine or on a Hub."""
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
    table(rows, as_json, empty="no adapters: run `adapterhub train`, `add` or `pull` to get one")


def search(
    text: Annotated[str, typer.Argument(help="Part of the adapter's name [default: any name].")] = "",
    base: Annotated[
        str | None,
        typer.Option("--base", help="List only adapters for this base model, given as its Hub id or fingerprint."),
    ] = None,
    hub: Annotated[
        str | None,
        typer.Option(
            "--hub", metavar="URL", callback=check_url, help="Address of a Hub to search instead of this machine."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search for adapters by name and base."""
    if hub is not None:
        found = [(one.name, one.revision, one.base or "") for one in hub_at(hub).search(text=text, base=base)]
    else:
        found = [
            (entry.name, entry.revision, entry.about.base)
            for entry in registry().list()
            if text.lower() in entry.name.lower()
            and (
                base is None
                or base == entry.about.base
                or (base[:4] == "fp1:" and entry.about.fingerprint.startswith(base))
            )
        ]
    rows = [
        {"name": name, "revision": revision if as_json else revision[:12], "base": of} for name, revision, of in found
    ]
    table(rows, as_json, empty="no adapters found")


def watch(
    name: Annotated[list[str] | None, typer.Argument(help="Names to watch [default: all names].")] = None,
    every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Time between two checks for new moves.",
            min=0.05,
            max=86_400,
            callback=check_finite,
        ),
    ] = 1.0,
) -> None:
    """Print each move of a name as it happens.

    Each line is one JSON object.
    """
    say("watching; press Ctrl+C to stop")
    with until_interrupted():
        for called, move in registry().watch(name or (), every_s=every):
            told = move.model_dump(mode="json")
            if move.about is not None:
                told["about"]["licence"] = move.about.license  # the old name, for one version
            show_json({"name": called, **told}, indent=None)


def resolve(ref: AnyRef, hub: HubUrl = None) -> None:
    """Print the digest and folder of an adapter.

    An adapter that is not on this machine is downloaded from the Hub first.
    """
    from adapterhub.adapter import AdapterRef

    adapter = registry(hub_at(hub)).resolve(AdapterRef.parse(ref))
    show(f"{adapter.digest} {adapter.path}")


def promote(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="NAME@REVISION",
            help="Adapter to point to; REVISION is a revision, an alias, a commit or sha256:<8 or more hex digits>.",
        ),
    ],
    alias: Annotated[str, typer.Argument(help="Alias to move or create, such as production.")],
    expect: Expect = None,
) -> None:
    """Move an alias to an adapter."""
    from adapterhub.adapter import AdapterRef

    moved = registry().promote(AdapterRef.parse(ref), alias, expect=expect, prove=lambda one: replay_probe(one, None))
    say(f"{alias}: {moved.before or 'nothing'} -> {moved.after}")
    show(moved.after)


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    alias: Annotated[str, typer.Argument(help="Alias to move back.")],
    expect: Expect = None,
) -> None:
    """Move an alias back to its previous adapter.

    Run it again to go back one more step.
    """
    moved = registry().rollback(name, alias, expect=expect)
    say(f"{alias}: {moved.before} -> {moved.after}")
    show(moved.after)


def history(name: Annotated[str, typer.Argument(help="Name of the adapter.")], as_json: AsJson = False) -> None:
    """List every move of a name's revisions and aliases.

    Shows when each was moved, by whom, from which digest and to which.
    """
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
    table(rows, as_json, empty="no moves")


def diff(a: AnyRef, b: AnyRef, as_json: AsJson = False) -> None:
    """Compare two adapters.

    Shows the differences in configuration, provenance and losses, and the norms of each layer's update.
    """
    from adapterhub.package.diff import difference

    found = difference(resolved(a), resolved(b))
    if as_json:
        show_json(asdict(found))
        return
    for title, changes in (("config", found.config), ("provenance", found.provenance), ("metrics", found.metrics)):
        for change in changes:
            show(f"{title:<11} {change.fact}: {change.before or '-'} -> {change.after or '-'}")
    layers = [layer for layer in found.layers if layer.distance != 0]
    say(f"{len(layers)} of {len(found.layers)} layers differ" if found.layers else "neither adapter changes a layer")
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


def remove(
    ref: Annotated[
        str, typer.Argument(metavar="NAME[@REVISION]", help="Revision or alias to remove; REVISION is main by default.")
    ],
) -> None:
    """Remove a revision or alias of a name.

    The package stays until `gc` deletes it.
    """
    from adapterhub.adapter import AdapterRef
    from adapterhub.errors import UsageError
    from adapterhub.registry.registry import DEFAULT_REVISION

    parsed = AdapterRef.parse(ref)
    if parsed.name is None:
        raise UsageError(f"{ref!r} is not a name: expected NAME[@REVISION]. Run `adapterhub gc` to delete packages.")
    moved = registry().remove(parsed.name, parsed.revision or DEFAULT_REVISION)
    say(f"removed {parsed.name}@{moved.revision}, which pointed to {moved.before}")


def gc(
    grace: Annotated[
        float,
        typer.Option(
            metavar="DAYS",
            help="Keep packages added or unreferenced within the last DAYS days.",
            min=0,
            max=36_500,
            callback=check_finite,
        ),
    ] = 7,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the packages that would be deleted, and delete nothing.")
    ] = False,
) -> None:
    """Delete unreferenced packages.

    A package is referenced while a name points to it, a running server uses it or an unfinished training run needs it.
    """
    removed = registry().gc(grace_s=grace * 86_400, dry_run=dry_run)
    for digest in removed.packages:
        show(digest)
    what = "would be deleted" if dry_run else "deleted"
    say(f"{len(removed.packages)} packages {what}, {format_bytes(removed.num_bytes)}")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
