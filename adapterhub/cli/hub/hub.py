"""Verbs that carry adapters between this machine, Hubs and files: push, pull, lock, mirror, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import HubUrl, hub_at, registry, resolved, say
from adapterhub.errors import UsageError
from adapterhub.units import format_bytes

if TYPE_CHECKING:
    from adapterhub.adapter import AdapterRef


@app.command()
def push(
    ref: Annotated[str, typer.Argument(help="A packed folder, a name in the registry, or a digest.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, made if it is not there.")],
    hub: HubUrl = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    pr: Annotated[bool, typer.Option("--pr", help="As a pull request, for the owners to look at.")] = False,
) -> None:
    """Publish an adapter as one commit on a Hub."""
    adapter = resolved(ref)
    target = hub_at(hub)
    say(f"pushing {adapter.manifest.name} {adapter.digest[:19]} to {target.endpoint}/{repo}")
    typer.echo(target.propose(adapter, repo) if pr else f"{repo}@{target.push(adapter, repo, private=private)}")


@app.command()
def pull(
    ref: Annotated[str | None, typer.Argument(metavar="OWNER/NAME[@REVISION]")] = None,
    hub: HubUrl = None,
    locked: Annotated[
        Path | None, typer.Option("--locked", metavar="FILE", help="Fetch exactly what a lock file lists.")
    ] = None,
) -> None:
    """Fetch an adapter from a Hub, verify it, and keep it in the local registry."""
    from adapterhub.adapter import AdapterRef

    if (ref is None) == (locked is None):
        raise UsageError("give either an adapter to pull, or --locked FILE.")
    if locked is not None:
        for ready in obtained(locked, hub).values():
            typer.echo(str(ready))
        return
    adapter = registry().pull(AdapterRef.parse(str(ref)), hub_at(hub), report=say)
    typer.echo(adapter.path)


def obtained(lock_path: Path, hub: str | None) -> dict[str, AdapterRef]:
    """Everything a lock file lists, here: the name it is served as -> the reference to exactly that adapter."""
    from adapterhub.registry.lock_file import read_lock

    kept = registry()
    lock = read_lock(lock_path)
    return {
        served_as: kept.obtain(one, hub_at(hub or one.hub) if one.hub else None, report=say)
        for served_as, one in lock.adapters.items()
    }


@app.command("lock")
def write_lock_file(
    adapter: Annotated[
        list[str], typer.Argument(metavar="[NAME=]REF...", help="What a deployment serves, and as what.")
    ],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("adapterhub.lock"),
) -> None:
    """Write down exactly which adapters names lead to now, for `serve --locked` and `pull --locked`."""
    from adapterhub.adapter import AdapterRef
    from adapterhub.registry.lock_file import write_lock

    wanted = {}
    for text in adapter:
        served_as, _, ref = text.rpartition("=")
        parsed = AdapterRef.parse(ref)
        wanted[served_as or str(parsed.name).rpartition("/")[2]] = parsed
    if len(wanted) < len(adapter):
        raise UsageError("two adapters would be served under one name: give NAME=REF.")
    write_lock(output, registry().lock(wanted))
    say(f"{len(wanted)} adapters locked")
    typer.echo(output)


@app.command()
def mirror(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    source: Annotated[str, typer.Option("--from", metavar="URL", help="The Hub it is on.")],
    target: Annotated[str, typer.Option("--to", metavar="URL", help="The Hub it goes to.")],
    name: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Its name there [default: the same].")] = None,
) -> None:
    """Copy an adapter and its history from one Hub to another; again, to bring the copy up to date."""
    from adapterhub.hub.mirror import mirror as mirror_adapter

    made = mirror_adapter(repo, hub_at(source), hub_at(target), name=name, report=say)
    say(f"{len(made)} commits copied")


@app.command("export")
def export_bundle(
    ref: Annotated[str, typer.Argument(help="Any way to name an adapter.")],
    file: Annotated[Path, typer.Argument(help="The file to write (.zip).")],
) -> None:
    """Write an adapter as a single file, signature and all."""
    from adapterhub.package.bundle import write_bundle

    adapter = resolved(ref)
    write_bundle(adapter, file)
    say(f"{file}: {adapter.manifest.name}, {format_bytes(file.stat().st_size)}")
    typer.echo(adapter.digest)


@app.command("import")
def import_bundle(
    file: Annotated[Path, typer.Argument(help="A file that `export` wrote.")],
    name: Annotated[str | None, typer.Option(help="Name to keep it under [default: the manifest's].")] = None,
) -> None:
    """Verify an adapter that comes as a single file, and keep it in the local registry."""
    typer.echo(registry().import_bundle(file, name=name).digest)
