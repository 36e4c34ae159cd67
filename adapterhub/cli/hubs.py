"""`adapterhub hub`: a Hub of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.app import hub_app
from adapterhub.cli.shared import (
    until_interrupted,
)


@hub_app.command("serve")
def hub_serve(
    root: Annotated[Path, typer.Option("--root", help="Folder the Hub keeps everything in.")] = Path("hub"),
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8089,
    tokens: Annotated[Path | None, typer.Option("--tokens", help="File of tokens; needed beyond loopback.")] = None,
) -> None:
    """Run a Hub-compatible server."""
    from adapterhub.hubserver.server import serve_hub

    with until_interrupted():
        serve_hub(root, host=host, port=port, tokens_file=tokens)
