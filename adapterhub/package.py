"""Adapter packages on disk: which files may be there, and making, opening and describing them.

The format is docs/adapter-format.md. Knows files and digests; torch is loaded only to record a probe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub import card
from adapterhub.adapter import Adapter
from adapterhub.base_store import StoredBase
from adapterhub.errors import (
    AdapterUnsupported,
    DigestMismatch,
    IncompatibleBase,
    MissingFile,
    PackageError,
    UnexpectedFile,
    UnsafeFile,
)
from adapterhub.files import disk_full_is_said, sha256_of, write_atomic
from adapterhub.lora_config import CONFIG_NAME, WEIGHTS_NAME, LoraConfig, LoraTensor, lora_tensors, read_lora_config
from adapterhub.manifest import (
    MANIFEST_NAME,
    BaseEntry,
    Chat,
    FileEntry,
    Manifest,
    Quantization,
    read_manifest,
)
from adapterhub.run_record import (
    LOG_NAME,
    RECIPE_NAME,
    REPORT_HEAD,
    REPORT_NAME,
    RunRecord,
    read_run_record,
)
from adapterhub.safetensors_header import read_header

TEMPLATE_NAME = "chat_template.jinja"
CARD_NAME = "README.md"
SIGNATURE_NAME = "adapter.sig"

REQUIRED = (CONFIG_NAME, WEIGHTS_NAME, TEMPLATE_NAME)
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
UNLISTED = (MANIFEST_NAME, CARD_NAME, SIGNATURE_NAME, ".gitattributes")
"""files that may change without the adapter becoming another one, so the digest leaves them out"""
ALLOWED = frozenset((*REQUIRED, *_TOKENIZER, RECIPE_NAME, LOG_NAME, REPORT_NAME, *UNLISTED))

_UNSAFE_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5"}
    | {".py", ".pyc", ".so", ".sh", ".exe", ".dll", ".dylib"}
)

Report = Callable[[str], None]


def open_adapter(folder: Path) -> Adapter:
    """Open a packed folder and check all of it: files, digests, tensors. This is what `verify` runs.

    Raises the PackageError that names what is wrong, AdapterUnsupported for other things than LoRA.
    """
    if not folder.is_dir():
        raise MissingFile(f"{folder} is not a folder: expected an adapter package (adapterhub.json and its files).")
    check_names(path.relative_to(folder).as_posix() for path in _walk(folder))
    manifest = read_manifest(folder)
    check_names(manifest.files)
    _check_digests(folder, manifest)
    _check_report(folder)
    for name in REQUIRED:
        if name not in manifest.files:
            raise MissingFile(f"{folder / MANIFEST_NAME} does not list {name}: pack the adapter again.")
    _read_lora(folder)
    return Adapter(folder, manifest)


def check_names(names: Iterable[str]) -> None:
    """Refuse, by name alone, files that do not belong beside an adapter. Used before a download, too.

    Raises UnsafeFile for pickles and anything executable, UnexpectedFile for the rest.
    """
    listed = sorted(names)
    unsafe = [name for name in listed if Path(name).suffix.lower() in _UNSAFE_SUFFIXES]
    if unsafe:
        raise UnsafeFile(
            f"{', '.join(unsafe[:5])} can run code when loaded: adapters are safetensors and text only. "
            "Remove it (convert old .bin weights by loading and saving them with a current PEFT)."
        )
    unexpected = [name for name in listed if name not in ALLOWED]
    if unexpected:
        raise UnexpectedFile(
            f"{', '.join(unexpected[:5])}{' ...' if len(unexpected) > 5 else ''} does not belong in an adapter "
            "package (whole models, optimizer states and notes stay outside): remove it."
        )


def pack(
    folder: Path,
    *,
    base: StoredBase,
    name: str | None = None,
    licence: str | None = None,
    report: Report = lambda line: None,
) -> Adapter:
    """Make a trained or adopted PEFT folder a package: template, probe, card, digests, manifest last.

    Packing again is allowed and replaces what packing wrote. Raises PackageError kinds for unsound folders
    and IncompatibleBase when the run record names another base.
    """
    from adapterhub import probe
    from adapterhub.base_model import load_base

    if not folder.is_dir():
        raise MissingFile(f"{folder} is not a folder: expected the output of training, or any PEFT adapter folder.")
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).exists():
        raise AdapterUnsupported(
            f"{folder} holds a whole model (full fine-tuning), not an adapter: serve it as a base, `adapterhub serve "
            f"--base {folder}`, or train LoRA."
        )
    check_names(path.relative_to(folder).as_posix() for path in _walk(folder))
    _check_report(folder)
    config, tensors = _read_lora(folder)
    record = read_run_record(folder)
    _check_same_base(folder, record, base)
    report(f"{len(tensors)} LoRA tensors, rank {config.rank}, {sum(t.info.numel for t in tensors):,} parameters")

    # In fp32 the proof is the same on every machine; an engine in another dtype is given that dtype's tolerance.
    held = held_as(record.quantization if record else None) | {"dtype": "float32"}
    loaded = load_base(base, purpose="serve", **held)
    with disk_full_is_said(folder):
        if not (folder / TEMPLATE_NAME).exists():
            write_atomic(folder / TEMPLATE_NAME, loaded.tokenizer.chat_template or "")
            report(f"{TEMPLATE_NAME} filled in from the base")
        _fill_base_revision(folder, base)
        answers = probe.record(loaded, folder)
        report(f"probe: {len(answers.answers)} prompts answered and recorded ({answers.dtype})")
        manifest = Manifest(
            name=name or folder.resolve().name,
            licence=licence or base.licence,
            base=_base_entry(base, record),
            lora=config.described(),
            chat=_chat(folder, loaded.tokenizer, stop=record.stop if record else ()),
            training=record.training if record else None,
            evaluations=list(record.evaluations) if record else [],
            probe=answers,
            files=_file_entries(folder),
        )
        write_atomic(folder / CARD_NAME, card.render(manifest))
        write_atomic(folder / MANIFEST_NAME, manifest.to_json())
    return open_adapter(folder)


@dataclass(frozen=True)
class Description:
    """What `inspect` shows: the manifest, and what only the tensors tell."""

    adapter: Adapter
    parameters: int
    dtypes: tuple[str, ...]
    size_bytes: int
    modules: int


def inspect(folder: Path) -> Description:
    """Open (and so verify) a package and count what is in it, from the header alone."""
    adapter = open_adapter(folder)
    _, tensors = _read_lora(folder)
    return Description(
        adapter,
        parameters=sum(tensor.info.numel for tensor in tensors),
        dtypes=tuple(sorted({tensor.info.dtype for tensor in tensors})),
        size_bytes=sum(entry.size for entry in adapter.manifest.files.values()),
        modules=len({tensor.module for tensor in tensors}),
    )


def held_as(quantization: Quantization | None) -> dict[str, Any]:
    """Arguments of `load_base` for the base as training had it; None, of an adopted adapter: as it usually is."""
    if quantization is None:
        return {}
    held = quantization.model_dump()
    return {"dtype": held.pop("compute_dtype"), **held}


def check_base(adapter: Adapter, base: StoredBase) -> None:
    """Raises IncompatibleBase, showing both sides, unless the adapter was made for exactly this base."""
    if adapter.manifest.base.fingerprint != base.ref.fingerprint:
        raise IncompatibleBase(
            f"adapter {adapter.manifest.name} was made for {adapter.base}, but this base is {base.ref}: "
            "use the base it was trained on, or train it again on this one."
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the folder's name in front of an error that knows only the content."""
    try:
        yield
    except PackageError as error:
        if str(path.parent) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def _read_lora(folder: Path) -> tuple[LoraConfig, list[LoraTensor]]:
    config = read_lora_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise MissingFile(f"{folder} has no {WEIGHTS_NAME}: save the adapter as safetensors (never .bin).")
    with _named(weights):
        return config, lora_tensors(read_header(weights), config)


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UnsafeFile(f"{path} is a symbolic link: packages hold plain files only; copy the file here.")
        if path.is_file():
            yield path


def _check_digests(folder: Path, manifest: Manifest) -> None:
    present = {path.name for path in _walk(folder)} - set(UNLISTED)
    missing = sorted(set(manifest.files) - present)
    if missing:
        raise MissingFile(f"{folder} lacks {', '.join(missing)}, which its manifest lists: fetch it again.")
    extra = sorted(present - set(manifest.files))
    if extra:
        raise UnexpectedFile(f"{folder} holds {', '.join(extra)}, which its manifest does not list: remove or repack.")
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size
        if size != entry.size:
            raise DigestMismatch(f"{path} has {size:,} bytes, the manifest says {entry.size:,}: fetch it again.")
        found = sha256_of(path)
        if found != entry.sha256:
            raise DigestMismatch(f"{path} has sha256 {found}, the manifest says {entry.sha256}: fetch it again.")


def _check_report(folder: Path) -> None:
    """A page from a stranger is opened in a browser: it must begin with the policy that forbids scripts."""
    path = folder / REPORT_NAME
    if not path.exists():
        return
    with path.open("rb") as file:
        begins = file.read(len(REPORT_HEAD))
    if begins != REPORT_HEAD.encode():
        raise UnsafeFile(
            f"{path} does not begin as a training report does, with a policy that lets a browser run no script and "
            "fetch nothing: remove it."
        )


def _check_same_base(folder: Path, record: RunRecord | None, base: StoredBase) -> None:
    if record and record.base.fingerprint != base.ref.fingerprint:
        raise IncompatibleBase(
            f"{folder} was trained on {record.base}, not on {base.ref}: pack it with --base {record.base.id}."
        )


def _fill_base_revision(folder: Path, base: StoredBase) -> None:
    """PEFT leaves `revision` (the base's) empty and may write a local path as the base; loaders need both right."""
    path = folder / CONFIG_NAME
    raw = json.loads(path.read_bytes())
    filled = raw | {"base_model_name_or_path": base.ref.id, "revision": base.ref.hub_revision}
    if filled != raw:
        write_atomic(path, json.dumps(filled, indent=2, sort_keys=True) + "\n")


def _base_entry(base: StoredBase, record: RunRecord | None) -> BaseEntry:
    return BaseEntry(
        id=base.ref.id,
        revision=base.ref.revision,
        fingerprint=str(base.ref.fingerprint),
        quantization=record.quantization if record else None,
    )


def _chat(folder: Path, tokenizer: Any, *, stop: Sequence[str]) -> Chat:
    return Chat(
        template_sha256=sha256_of(folder / TEMPLATE_NAME),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        pad=tokenizer.pad_token,
        stop=list(stop),
    )


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    return {
        path.name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size)
        for path in _walk(folder)
        if path.name not in UNLISTED
    }
