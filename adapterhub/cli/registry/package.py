"""Verbs on adapter folders: pack, verify, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import AsJson, base_with, registry, replay_probe, resolved, say
from adapterhub.units import format_bytes


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="The output of training, or any PEFT adapter folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base it was trained on; needed when no run record says so.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter [default: the folder's].")] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX licence id [default: the base's].")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Make the package here, of what belongs in one; FOLDER stays as it is [default: in place]."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text besides the end token that ends an answer; may be repeated."),
    ] = None,
) -> None:
    """Make a folder an adapter package: digests, card, recorded probe, manifest last."""
    from adapterhub.adapter import BaseRef
    from adapterhub.errors import UsageError
    from adapterhub.pack import adopt
    from adapterhub.pack import pack as pack_folder
    from adapterhub.package.run_record import read_run_record

    record = read_run_record(folder)
    if record is None and base is None:
        raise UsageError(f"{folder} does not say which base it was trained on: add --base ID, or a base folder.")
    stored = base_with(record.base if record else BaseRef("unknown"), base)
    if output is not None:
        name, folder = name or folder.resolve().name, adopt(folder, output, report=say)
    adapter = pack_folder(folder, base=stored, name=name, licence=licence, stop=stop or (), report=say)
    say(f"packed {adapter.manifest.name}: {len(adapter.manifest.files)} files")
    typer.echo(adapter.digest)


@app.command()
def verify(
    ref: Annotated[str, typer.Argument(help="A folder, a name, or a digest.")],
    probe: Annotated[bool, typer.Option("--probe", help="Also replay the recorded prompts (loads the base).")] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Check it against this base, too; replay on it [default: the one here]."),
    ] = None,
    key: Annotated[
        list[Path] | None, typer.Option("--key", help="Public key one of which must have signed it; may be repeated.")
    ] = None,
) -> None:
    """Check a package completely: file names, digests, tensors; the signature and the probe when asked."""
    adapter = resolved(ref)
    if key:
        from adapterhub.package.signing import PublicKey
        from adapterhub.package.signing import verify as verify_signature

        signer = verify_signature(adapter, [PublicKey.read(path) for path in key])
        say(f"signed by {signer.path}")
    if base is not None:
        from adapterhub.pack import check_layers
        from adapterhub.package.layout import check_base

        stored = base_with(adapter.base, base)
        check_base(adapter, stored)
        check_layers(adapter, stored)
        say(f"every tensor fits a layer of {stored.ref}")
    if probe:
        replay_probe(adapter, base)
    say(f"{adapter.manifest.name}: {len(adapter.manifest.files)} files, as they were packed")
    typer.echo(adapter.digest)


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes; PATH.pub is the public one.")],
) -> None:
    """Make a key pair to sign adapters with (encrypted when $ADAPTERHUB_KEY_PASSWORD is set)."""
    from adapterhub.package.signing import make_key

    private, public = make_key(path)
    say(f"{private} stays here; give {public} to those who verify")
    typer.echo(public)


@app.command()
def sign(
    ref: Annotated[str, typer.Argument(help="A folder, a name, or a digest.")],
    key: Annotated[Path, typer.Option("--key", help="Private key, as `adapterhub keygen` makes them.")],
) -> None:
    """Sign an adapter (OpenSSF Model Signing v1.0); its digest stays the same."""
    from adapterhub.package.signing import sign as sign_adapter

    adapter = resolved(ref)
    path = sign_adapter(adapter, key)
    say(f"{adapter.manifest.name}: signed, {path}")
    typer.echo(adapter.digest)


@app.command()
def inspect(
    ref: Annotated[str, typer.Argument(help="A folder, a name, or a digest.")], as_json: AsJson = False
) -> None:
    """Show what an adapter is: base, method, size, losses, digest, signature, the names that lead to it."""
    from adapterhub.package.layout import inspect as inspect_folder
    from adapterhub.package.signing import signer_hint

    found = inspect_folder(resolved(ref).path)
    manifest = found.adapter.manifest
    probe = manifest.probe
    kept = registry()
    names = [f"{entry.name}@{entry.revision}" for entry in kept.list() if entry.digest == found.adapter.digest]
    signer = signer_hint(found.adapter)
    if as_json:
        facts = {"digest": found.adapter.digest, "parameters": found.parameters, "path": str(found.adapter.path)}
        standing = {"names": names, "signed_by": signer, "probe_passed": kept.has_proof(found.adapter)}
        typer.echo(json.dumps({**facts, **standing, **manifest.model_dump(mode="json")}, indent=1))
        return
    passed = ", passed here" if kept.has_proof(found.adapter) else ""
    rows = [
        ("name", manifest.name),
        ("digest", found.adapter.digest),
        ("base", f"{manifest.base.id}@{manifest.base.revision}" if manifest.base.revision else manifest.base.id),
        ("fingerprint", manifest.base.fingerprint),
        ("method", f"{manifest.lora.method}, rank {manifest.lora.rank}, alpha {manifest.lora.alpha:g}"),
        ("targets", ", ".join(manifest.lora.targets)),
        ("parameters", f"{found.parameters:,} in {found.modules} layers ({', '.join(found.dtypes)})"),
        ("size", f"{format_bytes(found.size_bytes)} in {len(manifest.files)} files"),
        ("licence", manifest.licence or "not stated"),
        ("probe", f"{len(probe.answers)} prompts ({probe.dtype}){passed}" if probe else "none"),
        ("signature", f"says key {signer[:16]}; `adapterhub verify --key` checks it" if signer else "none"),
        ("names", ", ".join(names) or "none here"),
    ]
    rows += [(f"loss on {e.data}", f"{e.base_loss:.3f} -> {e.adapter_loss:.3f}") for e in manifest.evaluations]
    for label, value in rows:
        typer.echo(f"{label:<14} {value}")
