"""Pack a trained adapter folder into a package."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.base_copies import drop_base_copies
from adapterhub.bases.store import stored_base
from adapterhub.compatibility import check_compatible, check_tokenizer, check_vocabulary, module_shapes
from adapterhub.end_of_turn import end_of_turn
from adapterhub.errors import (
    AdapterHubError,
    AdapterUnsupported,
    IncompatibleBase,
    MissingFile,
    SignatureInvalid,
    UnsafeFile,
    UsageError,
)
from adapterhub.files import expanded, is_temporary, new_folder, raise_storage_full, sha256_of, sync, write_atomic
from adapterhub.package import card
from adapterhub.package.layout import (
    ALLOWED,
    CARD_NAME,
    SIGNATURE_NAME,
    TEMPLATE_NAME,
    UNLISTED,
    Report,
    check_names,
    check_report,
    check_values,
    open_adapter,
    read_lora,
    scan_weights,
    walk_files,
)
from adapterhub.package.lora_config import CONFIG_NAME, WEIGHTS_NAME, read_lora_config
from adapterhub.package.manifest import (
    MANIFEST_NAME,
    PROBE_NAME,
    BaseEntry,
    Chat,
    FileEntry,
    Manifest,
    Probe,
    Quantization,
    write_probe,
)
from adapterhub.package.own_template import tokenizer_config
from adapterhub.package.run_record import RunRecord, read_run_record
from adapterhub.package.signing import check_signed_files
from adapterhub.strict import parse_json

if TYPE_CHECKING:
    from adapterhub.bases.loading import LoadedBase


def pack(
    folder: Path | str,
    *,
    base: StoredBase | str | Path,
    output: Path | None = None,
    name: str | None = None,
    license: str | None = None,
    stop: Sequence[str] = (),
    report: Report = lambda line: None,
) -> Adapter:
    """Make a trained or adopted PEFT folder a package: template, probe, card, digests; the manifest is written last.

    With `output`, a new folder, the files that belong in a package are copied there and `folder` stays unchanged;
    the others are left out and reported. `stop` are strings besides the end token that end an answer. Packing again
    replaces what packing wrote. Raises PackageError kinds for unsound folders, IncompatibleBase when the run record
    names another base or a layer does not fit this one, UsageError when `output` exists.
    """
    if output is not None:
        output = expanded(output)
        if output.exists():
            raise UsageError(f"{output} exists already: expected a new folder. Choose another --output.")
        folder = expanded(folder)
        name = name or folder.resolve().name
        with new_folder(output) as copied:
            _copy_package_files(folder, copied, report=report)
            try:
                pack(copied, base=base, name=name, license=license, stop=stop, report=report)
            except AdapterHubError as error:  # about a folder that will be gone
                raise type(error)(str(error.args[0]).replace(str(copied), str(folder))) from error
        return open_adapter(output)
    from adapterhub import probe
    from adapterhub.bases.loading import load_base, load_tokenizer

    folder, base = expanded(folder), stored_base(base)
    if not folder.is_dir():
        raise MissingFile(f"{folder} is not a folder: expected the output of training, or any PEFT adapter folder.")
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).exists():
        raise AdapterUnsupported(
            f"{folder} is a whole model (full fine-tuning), not an adapter: serve it as a base, `adapterhub serve "
            f"--base {folder}`, or train LoRA."
        )
    for path in folder.iterdir():
        if is_temporary(path) and path.is_file():
            path.unlink()
    check_names(path.relative_to(folder).as_posix() for path in walk_files(folder))
    check_report(folder)
    for key in drop_base_copies(folder, read_lora_config(folder), base):
        report(f"{WEIGHTS_NAME}: {key} left out, it is the base's own weight")
    config, tensors = read_lora(folder)
    check_values(folder / WEIGHTS_NAME, scan_weights(folder / WEIGHTS_NAME))
    record = read_run_record(folder)
    _check_same_base(folder, record, base)
    shapes = module_shapes(base)
    has_tokenizer = (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists()
    check_vocabulary(name or folder.resolve().name, tensors, shapes, has_tokenizer=has_tokenizer)
    check_compatible(name or folder.resolve().name, config, tensors, shapes)
    report(f"{len(tensors)} LoRA tensors, rank {config.rank}, {sum(t.info.numel for t in tensors):,} parameters")

    # Before anything is loaded or written: a base without a chat template leaves no empty one behind.
    tokenizer = load_tokenizer(base)
    template, found_in = probe.template_of(folder, base.ref, tokenizer)
    check_tokenizer(name or folder.resolve().name, folder, tokenizer, template)
    # In fp32 the probe is the same on every machine; an engine in another dtype gets that dtype's tolerance.
    kwargs = load_kwargs(record.quantization if record else None) | {"dtype": "float32"}
    loaded = load_base(base, purpose="serve", tokenizer=tokenizer, **kwargs)
    with raise_storage_full(folder):
        if found_in != TEMPLATE_NAME:
            write_atomic(folder / TEMPLATE_NAME, template)
            report(f"{TEMPLATE_NAME} filled in from {found_in}")
        for line in _fill_base(folder, base):
            report(line)
        answers = _recorded(loaded, folder, date=record.date if record else None)
        report(f"probe: {len(answers.answers)} prompts answered and recorded ({answers.dtype})")
        manifest = Manifest(
            name=name or folder.resolve().name,
            license=license or base.license,
            base=_base_entry(base, record),
            lora=config.described(),
            chat=_chat(folder, loaded.tokenizer, stop=[*(record.stop if record else ()), *stop]),
            training=record.training if record else None,
            evaluations=list(record.evaluations) if record else [],
            probe=answers if record else None,
            files=_file_entries(folder),
        )
        if record is None:  # adopted: whoever adopts it, wherever, gets the same digest
            write_probe(folder, answers)
        write_atomic(folder / CARD_NAME, card.render(manifest))
        write_atomic(folder / MANIFEST_NAME, manifest.to_json())
        if record is not None:
            (folder / PROBE_NAME).unlink(missing_ok=True)
    adapter = open_adapter(folder)
    try:
        check_signed_files(adapter)
    except SignatureInvalid:
        (folder / SIGNATURE_NAME).unlink()
        report(f"{SIGNATURE_NAME} removed: it was of the package before")
    return adapter


def load_kwargs(quantization: Quantization | None) -> dict[str, Any]:
    """Return the arguments of `load_base` for the base as in training; the defaults where that is unknown (None)."""
    if quantization is None:
        return {}
    kwargs = quantization.model_dump()
    return {"dtype": kwargs.pop("compute_dtype"), **kwargs}


def _copy_package_files(folder: Path, target: Path, *, report: Report) -> None:
    """Copy the files that belong in a package from another tool's folder (PEFT, TRL, unsloth, axolotl) to `target`.

    Raises UnsafeFile for links and for weights that are only there as a pickle, MissingFile when there is no adapter.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for needed in (CONFIG_NAME, WEIGHTS_NAME):
        if needed not in names:
            is_pickled = needed == WEIGHTS_NAME and "adapter_model.bin" in names
            kind = UnsafeFile if is_pickled else MissingFile
            told = (
                "only adapter_model.bin, a pickle: load and save it with a current PEFT" if is_pickled else "no adapter"
            )
            raise kind(f"{folder} has no {needed} ({told}).")
    made_here = (MANIFEST_NAME, PROBE_NAME, SIGNATURE_NAME, CARD_NAME)
    taken = [name for name in names if name in ALLOWED and name not in made_here]
    for name in taken:
        if (folder / name).is_symlink():
            raise UnsafeFile(f"{folder / name} is a symbolic link: copy the file there.")
        shutil.copyfile(folder / name, target / name)
    left = [name for name in names if name not in taken]
    if left:
        report(f"left out: {', '.join(left[:8])}{f' and {len(left) - 8} more' if len(left) > 8 else ''}")


def _recorded(loaded: LoadedBase, folder: Path, *, date: str | None) -> Probe:
    """Record the probe, on the date that training rendered.

    Raises AdapterUnsupported with the words of PEFT where it cannot load the adapter.
    """
    from adapterhub import probe

    try:
        return probe.record(loaded, folder, date=datetime.date.fromisoformat(date) if date else None)
    except (AdapterHubError, MemoryError):
        raise
    except Exception as error:  # PEFT raises what its many methods raise
        raise AdapterUnsupported(
            f"PEFT cannot load {folder} on this base ({type(error).__name__}: {str(error)[:300]}): expected an adapter "
            "that PEFT loads. Save it again with the PEFT and transformers that are installed here."
        ) from error


def _check_same_base(folder: Path, record: RunRecord | None, base: StoredBase) -> None:
    if record and record.base.fingerprint != base.ref.fingerprint:
        raise IncompatibleBase(
            f"{folder} was trained on {record.base}, not on {base.ref}: pack it with --base {record.base.id}."
        )


def _fill_base(folder: Path, base: StoredBase) -> list[str]:
    """Write the base's id and revision into adapter_config.json; PEFT may leave a local path and no revision there.

    A start of training that changed no base is replaced by PEFT's default: it is of no use after training, and PEFT
    cannot load some of them on a quantized base.
    Return one line per field that was changed.
    """
    path = folder / CONFIG_NAME
    raw = parse_json(path.read_bytes())
    filled: dict[str, Any] = {"base_model_name_or_path": base.ref.id, "revision": base.ref.hub_revision}
    if isinstance(raw.get("init_lora_weights"), str):
        filled["init_lora_weights"] = True
    changed = {key: value for key, value in filled.items() if raw.get(key) != value}
    if changed:
        # Packed before, and for another base: from here until the new manifest it is no package.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        sync(folder)
        write_atomic(path, json.dumps(raw | changed, indent=2, sort_keys=True) + "\n")
    return [f"{CONFIG_NAME}: {key} was {raw.get(key)!r}, is {value!r}" for key, value in changed.items()]


def _base_entry(base: StoredBase, record: RunRecord | None) -> BaseEntry:
    return BaseEntry(
        id=base.ref.id,
        revision=base.ref.revision,
        fingerprint=str(base.ref.fingerprint),
        quantization=record.quantization if record else None,
    )


def _chat(folder: Path, tokenizer: Any, *, stop: Sequence[str]) -> Chat:
    """Return the special tokens of the adapter's own tokenizer_config.json, else those of the base's tokenizer."""
    own = tokenizer_config(folder)

    def token(name: str) -> str | None:
        found = own.get(name, getattr(tokenizer, name))
        return found.get("content") if isinstance(found, dict) else found

    end = end_of_turn(tokenizer, (folder / TEMPLATE_NAME).read_text(encoding="utf-8"))
    return Chat(
        template_sha256=sha256_of(folder / TEMPLATE_NAME),
        bos=token("bos_token"),
        eos=token("eos_token"),
        pad=token("pad_token"),
        stop=list(stop),
        stop_token_ids=[] if end is None else [end],
    )


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    return {
        path.name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size)
        for path in walk_files(folder)
        if path.name not in UNLISTED
    }
