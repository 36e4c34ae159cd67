"""Commands on packages: pack, verify, inspect, keygen, sign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.options import (
    AnyRef,
    AsJson,
    base_with,
    check_name,
    registry,
    replay_probe,
    resolved,
    say,
    show,
    show_json,
)
from adapterhub.units import format_bytes


def pack(
    folder: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="Output folder of `train`, or any PEFT adapter folder."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="Base model the adapter was trained on; required for folders that `train` did not write."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(callback=check_name, help="Name of the adapter [default: the folder's name].")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="SPDX license id of the adapter [default: the base model's].")
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", hidden=True)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to copy the package's files to; FOLDER stays unchanged [default: pack FOLDER in place]."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Stop string: an answer ends before it. Repeatable."),
    ] = None,
) -> None:
    """Turn an adapter folder into a package.

    Writes digests, a model card, a recorded probe and, last, the manifest.
    """
    from adapterhub.adapter import BaseRef
    from adapterhub.errors import UsageError
    from adapterhub.package.run_record import read_run_record
    from adapterhub.packer import pack as pack_folder

    if None not in (license, licence):
        raise UsageError("--license and --licence are the same setting: give --license only.")
    record = read_run_record(folder)
    if record is None and base is None:
        raise UsageError(
            f"no base model is recorded in {folder}: expected the output of `train`. Add --base ID or --base FOLDER."
        )
    stored = base_with(record.base if record else BaseRef("unknown"), base)
    adapter = pack_folder(
        folder, base=stored, output=output, name=name, license=license or licence, stop=stop or (), report=say
    )
    say(f"packed {adapter.manifest.name}: {len(adapter.manifest.files)} files")
    show(adapter.digest)


def verify(
    ref: Annotated[
        str | None,
        typer.Argument(help="Adapter: a name (name[@revision]), a digest, or a folder that starts with ./ or /."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Verify every package and name on this machine, and list what is lost.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also replay the recorded probe, which loads the base model.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model to check the adapter's layers against, and to replay the probe on."),
    ] = None,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key",
            exists=True,
            dir_okay=False,
            help="Public key file; one of those given must have signed. Repeatable.",
        ),
    ] = None,
) -> None:
    """Verify a package's files, digests and tensors.

    Verifies the signature with --key, the layers with --base, and the recorded answers with --probe. With --all it
    verifies the whole store; the exit code is 4 if anything is damaged or lost.
    """
    from adapterhub.errors import UsageError

    if everything == (ref is not None) or (everything and (key or base or probe)):
        raise UsageError("verify takes an adapter, or --all without --key, --base and --probe: give one of the two.")
    if ref is None:
        _verify_all()
        return
    adapter = resolved(ref)
    if key:
        from adapterhub.package.signing import PublicKey
        from adapterhub.package.signing import verify as verify_signature

        signer = verify_signature(adapter, [PublicKey.read(path) for path in key])
        say(f"signed by {signer.path}")
    if base is not None:
        from adapterhub.compatibility import check_adapter

        stored = base_with(adapter.base, base)
        check_adapter(adapter, stored)
        say(f"compatible with {stored.ref}: every tensor has the shape of its layer")
    if probe:
        replay_probe(adapter, base)
    say(f"{adapter.manifest.name}: {len(adapter.manifest.files)} files verified")
    show(adapter.digest)


def _verify_all() -> None:
    from adapterhub.errors import PackageError

    kept = registry()
    num_damaged = num_names = 0
    for finding in kept.verify_all():
        num_damaged, num_names = num_damaged + 1, num_names + len(finding.names)
        show(f"{finding.what}  {', '.join(finding.names) or 'no name'}")
        say(f"{finding.what[:19]}: {finding.why}")
    num_packages = len(kept.store.digests())
    if num_damaged:
        raise PackageError(
            f"{num_damaged} damaged or lost in {kept.root}, {num_names} names with them; {num_packages} packages are "
            "stored: expected none. Pull or add those listed again."
        )
    say(f"{num_packages} packages verified, nothing is damaged or lost")


def keygen(
    path: Annotated[Path, typer.Argument(help="File to write the private key to; the public key goes to PATH.pub.")],
) -> None:
    """Create a key pair to sign adapters with.

    The private key is encrypted when $ADAPTERHUB_KEY_PASSWORD is set.
    """
    from adapterhub.package.signing import make_key

    private, public = make_key(path)
    say(f"keep {private} secret; give {public} to those who verify")
    show(public)


def sign(
    ref: AnyRef,
    key: Annotated[
        Path,
        typer.Option("--key", exists=True, dir_okay=False, help="Private key file, created by `adapterhub keygen`."),
    ],
) -> None:
    """Sign an adapter.

    Writes an OpenSSF Model Signing v1.0 signature beside the manifest; the digest stays the same.
    """
    from adapterhub.package.signing import sign as sign_adapter

    adapter = resolved(ref)
    path = sign_adapter(adapter, key)
    say(f"{adapter.manifest.name}: signed, {path}")
    show(adapter.digest)


def inspect(ref: AnyRef, as_json: AsJson = False) -> None:
    """Show an adapter's base, method, losses and digest.

    Also shows its size, its signature and the names that point to it.
    """
    from adapterhub.package.layout import inspect as inspect_folder
    from adapterhub.package.signing import signer_hint

    found = inspect_folder(resolved(ref).path)
    manifest = found.adapter.manifest
    probe = found.adapter.probe
    kept = registry()
    names = [f"{entry.name}@{entry.revision}" for entry in kept.list() if entry.digest == found.adapter.digest]
    signer = signer_hint(found.adapter)
    if as_json:
        facts = {"digest": found.adapter.digest, "parameters": found.parameters, "path": str(found.adapter.path)}
        passed = kept.probe_passed(found.adapter)
        standing = {"names": names, "signed_by": signer, "probe_passed": passed}
        told = {**facts, **standing, **manifest.model_dump(mode="json")}
        old_spellings = {"licence": manifest.license, "proof_passed_here": passed}  # for one version
        show_json(told | old_spellings)
        return
    replayed = ", passed here" if kept.probe_passed(found.adapter) else ""
    rows = [
        ("name", manifest.name),
        ("digest", found.adapter.digest),
        ("base", f"{manifest.base.id}@{manifest.base.revision}" if manifest.base.revision else manifest.base.id),
        ("fingerprint", manifest.base.fingerprint),
        ("method", f"{manifest.lora.method}, rank {manifest.lora.rank}, alpha {manifest.lora.alpha:g}"),
        ("targets", ", ".join(manifest.lora.targets)),
        ("parameters", f"{found.parameters:,} in {found.modules} layers ({', '.join(found.dtypes)})"),
        ("size", f"{format_bytes(found.size_bytes)} in {len(manifest.files)} files"),
        ("license", manifest.license or "not stated"),
        ("probe", f"{len(probe.answers)} prompts ({probe.dtype}){replayed}" if probe else "none"),
        ("signature", f"by key {signer[:16]}, not verified; run `adapterhub verify --key`" if signer else "none"),
        ("names", ", ".join(names) or "none on this machine"),
    ]
    rows += [(f"loss on {e.data}", f"{e.base_loss:.3f} -> {e.adapter_loss:.3f}") for e in manifest.evaluations]
    for label, value in rows:
        show(f"{label:<14} {value}")
