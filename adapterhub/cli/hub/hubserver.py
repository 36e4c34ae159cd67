"""`adapterhub hub`: a Hub of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.app import hub_app
from adapterhub.cli.options import say, until_interrupted
from adapterhub.errors import UsageError
from adapterhub.units import format_bytes


@hub_app.command("serve")
def hub_serve(
    root: Annotated[Path, typer.Option("--root", help="Folder the Hub keeps everything in.")] = Path("hub"),
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8089,
    tokens: Annotated[Path | None, typer.Option("--tokens", help="File of tokens; needed beyond loopback.")] = None,
    repo_quota_gb: Annotated[
        float | None, typer.Option(help="What one repository may keep; without, no limit.")
    ] = None,
    owner_quota_gb: Annotated[float | None, typer.Option(help="What all repositories of one owner may keep.")] = None,
) -> None:
    """Run a Hub-compatible server."""
    from adapterhub.hubserver.server import serve_hub
    from adapterhub.hubserver.storage.quotas import Limits

    limits = Limits(repo_bytes=_bytes(repo_quota_gb), owner_bytes=_bytes(owner_quota_gb))
    with until_interrupted():
        serve_hub(root, host=host, port=port, tokens_file=tokens, limits=limits)


@hub_app.command("gc")
def hub_gc(
    root: Annotated[Path, typer.Option("--root", help="Folder of the Hub, which may be running.")],
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS",
            min=0.25,
            help="Keep objects added or used within the last DAYS days; at least 0.25 [default: 1].",
        ),
    ] = None,
    grace_hours: Annotated[float | None, typer.Option(min=6, hidden=True, help="Old form of --grace.")] = None,
) -> None:
    """Delete unreferenced objects and abandoned uploads.

    An object is referenced while a branch, a tag or a pull request reaches it.
    """
    from adapterhub.hubserver.garbage_collection import GarbageCollector

    if not (root / "repos").is_dir():
        raise UsageError(f"{root} is not the data folder of a Hub: it has no folder 'repos'.")
    if grace_hours is not None:
        if grace is not None:
            raise UsageError("--grace and --grace-hours are the same setting: give --grace DAYS only.")
        say("--grace-hours is deprecated: use --grace DAYS")
        grace = grace_hours / 24
    deleted = (GarbageCollector(root) if grace is None else GarbageCollector(root, grace_s=grace * 86_400)).gc()
    typer.echo(
        f"deleted {deleted.num_objects} objects and {deleted.num_commits} commits, {format_bytes(deleted.freed_bytes)}"
    )


def _bytes(gb: float | None) -> int | None:
    return None if gb is None else int(gb * 1e9)
