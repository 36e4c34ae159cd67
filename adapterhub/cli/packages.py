"""Verbs on adapter folders: pack, verify, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.shared import (
    AsJson,
    base_with,
    resolved,
    say,
)

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter
    from adapterhub.base_store import StoredBase


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The output of training, or any PEFT adapter folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base it was trained on; needed when no run record says so.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter [default: the folder's].")] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX licence id [default: the base's].")] = None,
) -> None:
    """Make a folder an adapter package: digests, card, recorded probe, manifest last."""
    from adapterhub.adapter import BaseRef
    from adapterhub.errors import UsageError
    from adapterhub.package import pack as pack_folder
    from adapterhub.run_record import read_run_record

    record = read_run_record(folder)
    if record is None and base is None:
        raise UsageError(f"{folder} does not say which base it was trained on: add --base ID, or a base folder.")
    stored = base_with(record.base if record else BaseRef("unknown"), base)
    adapter = pack_folder(folder, base=stored, name=name, licence=licence, report=say)
    say(f"packed {adapter.manifest.name}: {len(adapter.manifest.files)} files")
    typer.echo(adapter.digest)


@app.command()
def verify(
    ref: Annotated[str, typer.Argument(help="A folder, a name, or a digest.")],
    probe: Annotated[bool, typer.Option("--probe", help="Also replay the recorded prompts (loads the base).")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="The base to replay on [default: the one here with its fingerprint].")
    ] = None,
) -> None:
    """Check a package completely: file names, digests, tensors, and the probe when asked."""
    adapter = resolved(ref)
    if probe:
        _replay_probe(adapter, base_with(adapter.base, base))
    say(f"{adapter.manifest.name}: {len(adapter.manifest.files)} files, as they were packed")
    typer.echo(adapter.digest)


def _replay_probe(adapter: Adapter, base: StoredBase) -> None:
    from adapterhub.base_model import load_base
    from adapterhub.errors import ProbeMismatch
    from adapterhub.package import check_base, held_as
    from adapterhub.probe import replay

    recorded = adapter.manifest.probe
    if recorded is None:
        raise ProbeMismatch(f"{adapter.manifest.name} carries no probe: pack it again to record one.")
    check_base(adapter, base)
    held = held_as(adapter.manifest.base.quantization) | {"dtype": recorded.dtype}
    replay(load_base(base, purpose="serve", **held), adapter.path, recorded)
    say(f"probe: {len(recorded.answers)} recorded prompts answered as before ({recorded.dtype})")


@app.command()
def inspect(
    ref: Annotated[str, typer.Argument(help="A folder, a name, or a digest.")], as_json: AsJson = False
) -> None:
    """Show what an adapter is: base, method, size, losses, digest."""
    from adapterhub.package import inspect as inspect_folder

    found = inspect_folder(resolved(ref).path)
    manifest = found.adapter.manifest
    if as_json:
        facts = {"digest": found.adapter.digest, "parameters": found.parameters, "path": str(found.adapter.path)}
        typer.echo(json.dumps({**facts, **manifest.model_dump(mode="json")}, indent=1))
        return
    rows = [
        ("name", manifest.name),
        ("digest", found.adapter.digest),
        ("base", f"{manifest.base.id}@{manifest.base.revision}" if manifest.base.revision else manifest.base.id),
        ("fingerprint", manifest.base.fingerprint),
        ("method", f"{manifest.lora.method}, rank {manifest.lora.rank}, alpha {manifest.lora.alpha:g}"),
        ("targets", ", ".join(manifest.lora.targets)),
        ("parameters", f"{found.parameters:,} in {found.modules} layers ({', '.join(found.dtypes)})"),
        ("size", f"{found.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files"),
        ("licence", manifest.licence or "not stated"),
        ("probe", f"{len(manifest.probe.answers)} prompts ({manifest.probe.dtype})" if manifest.probe else "none"),
    ]
    rows += [(f"loss on {e.data}", f"{e.base_loss:.3f} -> {e.adapter_loss:.3f}") for e in manifest.evaluations]
    for label, value in rows:
        typer.echo(f"{label:<14} {value}")
