"""`adapterhub hub`: a Hub of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.app import hub_app
from adapterhub.cli.options import until_interrupted
from adapterhub.errors import UsageError


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
    root: Annotated[Path, typer.Option("--root", help="The folder of a Hub, which may be serving meanwhile.")],
    grace_hours: Annotated[float, typer.Option(min=6, help="What is younger stays.")] = 24,
) -> None:
    """Remove objects that no branch, tag or pull request reaches, and what killed uploads left."""
    from adapterhub.hubserver.garbage_collection import Sweeper

    if not (root / "repos").is_dir():
        raise UsageError(f"{root} is not the folder of a Hub: it holds no 'repos'.")
    swept = Sweeper(root, grace_s=grace_hours * 3600).sweep()
    typer.echo(f"removed {swept.objects} objects and {swept.commits} commits, {swept.freed_bytes / 1e6:.1f} MB in all")


def _bytes(gb: float | None) -> int | None:
    return None if gb is None else int(gb * 1e9)
