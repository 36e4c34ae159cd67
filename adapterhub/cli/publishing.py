"""Verbs that carry adapters between this machine and Hubs: push, pull."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.shared import HubUrl, hub_at, registry, resolved, say


@app.command()
def push(
    ref: Annotated[str, typer.Argument(help="A packed folder, a name in the registry, or a digest.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, made if it is not there.")],
    hub: HubUrl = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Publish an adapter as one commit on a Hub."""
    adapter = resolved(ref)
    target = hub_at(hub)
    say(f"pushing {adapter.manifest.name} {adapter.digest[:19]} to {target.endpoint}/{repo}")
    typer.echo(f"{repo}@{target.push(adapter, repo, private=private)}")


@app.command()
def pull(
    ref: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]")],
    hub: HubUrl = None,
) -> None:
    """Fetch an adapter from a Hub, verify it, and keep it in the local registry."""
    from adapterhub.adapter import AdapterRef

    adapter = registry().pull(AdapterRef.parse(ref), hub_at(hub), report=say)
    typer.echo(adapter.path)
