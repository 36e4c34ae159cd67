"""Commands that run and clean a Hub of your own: `hub serve` and `hub gc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.options import Port, check_finite, check_positive, say, show, until_interrupted
from adapterhub.errors import UsageError
from adapterhub.units import format_bytes


def hub_serve(
    root: Annotated[
        Path, typer.Option("--root", help="Folder that holds the Hub's repositories, created if it does not exist.")
    ] = Path("hub"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback --tokens is required.")
    ] = "127.0.0.1",
    port: Port = 8089,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            exists=True,
            dir_okay=False,
            help="File of access tokens [default: one token, written to ROOT/token].",
        ),
    ] = None,
    repo_quota_gb: Annotated[
        float | None,
        typer.Option(callback=check_positive, help="Storage limit of one repository, in GB [default: no limit]."),
    ] = None,
    owner_quota_gb: Annotated[
        float | None,
        typer.Option(
            callback=check_positive, help="Storage limit of all repositories of one owner, in GB [default: no limit]."
        ),
    ] = None,
) -> None:
    """Run a Hub-compatible server."""
    from adapterhub.hubserver.server import serve_hub
    from adapterhub.hubserver.storage.quotas import Limits

    limits = Limits(repo_bytes=_bytes(repo_quota_gb), owner_bytes=_bytes(owner_quota_gb))
    with until_interrupted():
        serve_hub(root, host=host, port=port, tokens_file=tokens, limits=limits)


def hub_gc(
    root: Annotated[Path, typer.Option("--root", help="Folder of the Hub, which may be running.")],
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS",
            min=0.25,
            max=36_500,
            callback=check_finite,
            help="Keep objects added or used within the last DAYS days; at least 0.25 [default: 1].",
        ),
    ] = None,
    grace_hours: Annotated[
        float | None,
        typer.Option(min=6, max=876_000, callback=check_finite, hidden=True, help="Old form of --grace."),
    ] = None,
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
    show(
        f"deleted {deleted.num_objects} objects and {deleted.num_commits} commits, {format_bytes(deleted.freed_bytes)}"
    )


def _bytes(gb: float | None) -> int | None:
    return None if gb is None else int(gb * 1e9)
