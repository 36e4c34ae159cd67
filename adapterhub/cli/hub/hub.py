"""Commands that move adapters between this machine, Hubs and files: push, pull, lock, mirror, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.options import (
    AdapterName,
    AnyRef,
    HubUrl,
    check_name,
    check_url,
    hub_at,
    registry,
    resolved,
    say,
    show,
)
from adapterhub.errors import UsageError
from adapterhub.units import format_bytes

if TYPE_CHECKING:
    from adapterhub.adapter import AdapterRef
    from adapterhub.hub.client import Hub


def push(
    ref: AnyRef,
    repo: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME", callback=check_name, help="Repository on the Hub, created if it does not exist."
        ),
    ],
    hub: HubUrl = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing to main.")] = False,
) -> None:
    """Publish an adapter to a Hub as one commit."""
    adapter = resolved(ref)
    target = hub_at(hub)
    say(f"pushing {adapter.manifest.name} {adapter.digest[:19]} to {target.endpoint}/{repo}")
    show(target.propose(adapter, repo) if pr else f"{repo}@{target.push(adapter, repo, private=private)}")


def pull(
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="OWNER/NAME[@REVISION]", help="Repository to download; REVISION is a branch, a tag or a commit."
        ),
    ] = None,
    hub: HubUrl = None,
    locked: Annotated[
        Path | None,
        typer.Option(
            "--locked", metavar="FILE", exists=True, dir_okay=False, help="Lock file whose adapters to download."
        ),
    ] = None,
) -> None:
    """Download an adapter from a Hub and verify it.

    The adapter is added to the local registry; with --locked, so is every adapter of a lock file.
    """
    from adapterhub.adapter import AdapterRef

    if (ref is None) == (locked is None):
        raise UsageError("expected either OWNER/NAME or --locked FILE: give one of them.")
    if locked is not None:
        for ready in obtained(locked, hub).values():
            show(str(ready))
        return
    adapter = registry().pull(AdapterRef.parse(str(ref)), hub_at(hub), report=say)
    show(adapter.path)


def obtained(lock_path: Path, hub: str | None) -> dict[str, AdapterRef]:
    """Download what a lock file lists; return the name each adapter is served as, and its exact reference."""
    from adapterhub.registry.lock_file import read_lock

    kept = registry()
    lock = read_lock(lock_path)
    return {
        served_as: kept.obtain(one, hub_at(hub or one.hub) if one.hub else None, report=say)
        for served_as, one in lock.adapters.items()
    }


def write_lock_file(
    adapter: Annotated[
        list[str], typer.Argument(metavar="[NAME=]REF...", help="Adapter to serve, and the name to serve it as.")
    ],
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("adapterhub.lock"),
) -> None:
    """Write a lock file of the adapters that a deployment serves.

    It holds the exact digests that the names point to now, for `serve --locked` and `pull --locked`.
    """
    from adapterhub.adapter import AdapterRef
    from adapterhub.registry.lock_file import write_lock

    wanted = {}
    for text in adapter:
        served_as, _, ref = text.rpartition("=")
        parsed = AdapterRef.parse(ref)
        wanted[served_as or str(parsed.name).rpartition("/")[2]] = parsed
    if len(wanted) < len(adapter):
        raise UsageError("two adapters would be served under one name: expected different names. Give NAME=REF.")
    write_lock(output, registry().lock(wanted))
    say(f"{len(wanted)} adapters locked")
    show(output)


def mirror(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", callback=check_name, help="Repository to copy.")],
    source: Annotated[
        str, typer.Option("--from", metavar="URL", callback=check_url, help="Address of the Hub to copy from.")
    ],
    target: Annotated[
        str, typer.Option("--to", metavar="URL", callback=check_url, help="Address of the Hub to copy to.")
    ],
    name: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", callback=check_name, help="Repository to copy to [default: the same name]."),
    ] = None,
    from_token: Annotated[
        Path | None,
        typer.Option("--from-token-file", exists=True, dir_okay=False, help="File with a token for the Hub of --from."),
    ] = None,
    to_token: Annotated[
        Path | None,
        typer.Option("--to-token-file", exists=True, dir_okay=False, help="File with a token for the Hub of --to."),
    ] = None,
) -> None:
    """Copy an adapter and its history to another Hub.

    Run it again to update the copy, which is as private and as gated as the original. Each Hub has a token of its own:
    that of a token file, else $HF_TOKEN for the Hub that $HF_ENDPOINT names.
    """
    from adapterhub.hub.mirror import mirror as mirror_adapter

    there, copy = _hub_with(source, from_token), _hub_with(target, to_token)
    made = mirror_adapter(repo, there, copy, name=name, report=say)
    say(f"{len(made)} commits copied")


def _hub_with(endpoint: str, token_file: Path | None) -> Hub:
    if token_file is None:
        return hub_at(endpoint)
    from adapterhub.hub.client import Hub

    token = token_file.read_text(encoding="utf-8").strip()
    if not token:
        raise UsageError(f"{token_file} is empty: expected a token for {endpoint}. Write it there.")
    return Hub(endpoint.rstrip("/"), token)


def export_bundle(
    ref: AnyRef,
    file: Annotated[Path, typer.Argument(dir_okay=False, help="The .zip file to write.")],
) -> None:
    """Write an adapter to a single .zip file.

    The signature is included.
    """
    from adapterhub.package.bundle import write_bundle

    adapter = resolved(ref)
    write_bundle(adapter, file)
    say(f"{file}: {adapter.manifest.name}, {format_bytes(file.stat().st_size)}")
    show(adapter.digest)


def import_bundle(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The .zip file, written by `export`.")],
    name: AdapterName = None,
) -> None:
    """Verify an exported .zip file and add it to the registry."""
    show(registry().import_bundle(file, name=name).digest)
