"""Adapter packages on disk: which files may be there, and making, opening and describing them.

The format is docs/adapter-format.md. Knows files and digests; torch is loaded only to record a probe.
"""

from __future__ import annotations

import json
import shutil
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
    InvalidTensors,
    MissingFile,
    PackageError,
    UnexpectedFile,
    UnsafeFile,
    UsageError,
)
from adapterhub.files import disk_full_is_said, is_temporary, new_folder, sha256_of, write_atomic
from adapterhub.fit import check_fit, check_vocabulary, module_shapes
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
from adapterhub.tensor_values import sha256_and_strangers

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
            "Remove it, or let `adapterhub pack FOLDER --output NEW` leave it out (convert old .bin weights by loading "
            "and saving them with a current PEFT)."
        )
    unexpected = [name for name in listed if name not in ALLOWED]
    if unexpected:
        why = (
            "a whole model's config.json makes loaders take the folder for one"
            if "config.json" in unexpected
            else ("whole models, optimizer states and notes stay outside")
        )
        raise UnexpectedFile(
            f"{', '.join(unexpected[:5])}{' ...' if len(unexpected) > 5 else ''} does not belong in an adapter "
            f"package ({why}): remove it, or let `adapterhub pack FOLDER --output NEW` take only what belongs."
        )


def pack(
    folder: Path,
    *,
    base: StoredBase,
    name: str | None = None,
    licence: str | None = None,
    stop: Sequence[str] = (),
    report: Report = lambda line: None,
) -> Adapter:
    """Make a trained or adopted PEFT folder a package: template, probe, card, digests, manifest last.

    `stop` are strings besides the end token that end an answer. Packing again replaces what packing wrote. Raises
    PackageError kinds for unsound folders, IncompatibleBase when the run record names another base or a layer does
    not fit this one.
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
    for path in folder.iterdir():
        if is_temporary(path) and path.is_file():
            path.unlink()
    check_names(path.relative_to(folder).as_posix() for path in _walk(folder))
    _check_report(folder)
    config, tensors = _read_lora(folder)
    _check_values(folder / WEIGHTS_NAME, _sha256_of_weights(folder / WEIGHTS_NAME)[1])
    record = read_run_record(folder)
    _check_same_base(folder, record, base)
    shapes = module_shapes(base)
    has_tokenizer = (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists()
    check_vocabulary(name or folder.resolve().name, tensors, shapes, has_tokenizer=has_tokenizer)
    check_fit(name or folder.resolve().name, config, tensors, shapes)
    report(f"{len(tensors)} LoRA tensors, rank {config.rank}, {sum(t.info.numel for t in tensors):,} parameters")

    # In fp32 the proof is the same on every machine; an engine in another dtype is given that dtype's tolerance.
    held = held_as(record.quantization if record else None) | {"dtype": "float32"}
    loaded = load_base(base, purpose="serve", **held)
    with disk_full_is_said(folder):
        if not (folder / TEMPLATE_NAME).exists():
            write_atomic(folder / TEMPLATE_NAME, loaded.tokenizer.chat_template or "")
            report(f"{TEMPLATE_NAME} filled in from the base")
        for line in _fill_base(folder, base):
            report(line)
        answers = probe.record(loaded, folder)
        report(f"probe: {len(answers.answers)} prompts answered and recorded ({answers.dtype})")
        manifest = Manifest(
            name=name or folder.resolve().name,
            licence=licence or base.licence,
            base=_base_entry(base, record),
            lora=config.described(),
            chat=_chat(folder, loaded.tokenizer, stop=[*(record.stop if record else ()), *stop]),
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


def adopt(folder: Path, output: Path, *, report: Report = lambda line: None) -> Path:
    """Copy what belongs in a package from a folder other tools left (PEFT, TRL, unsloth, axolotl) into `output`.

    The rest is left out and told. Raises UsageError when `output` is there, UnsafeFile for links and for weights that
    are only there as a pickle, MissingFile when there is no adapter.
    """
    if output.exists():
        raise UsageError(f"{output} is there already: give a folder that is not.")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for needed in (CONFIG_NAME, WEIGHTS_NAME):
        if needed not in names:
            is_pickled = needed == WEIGHTS_NAME and "adapter_model.bin" in names
            kind = UnsafeFile if is_pickled else MissingFile
            told = (
                "only adapter_model.bin, a pickle: load and save it with a current PEFT" if is_pickled else "no adapter"
            )
            raise kind(f"{folder} has no {needed} ({told}).")
    taken = [name for name in names if name in ALLOWED and name not in (MANIFEST_NAME, SIGNATURE_NAME, CARD_NAME)]
    with new_folder(output) as temporary:
        for name in taken:
            if (folder / name).is_symlink():
                raise UnsafeFile(f"{folder / name} is a symbolic link: copy the file there.")
            shutil.copyfile(folder / name, temporary / name)
    left = [name for name in names if name not in taken]
    if left:
        report(f"left out: {', '.join(left[:8])}{f' and {len(left) - 8} more' if len(left) > 8 else ''}")
    return output


def check_base(adapter: Adapter, base: StoredBase) -> None:
    """Raises IncompatibleBase, showing both sides, unless the adapter was made for exactly this base."""
    if adapter.manifest.base.fingerprint != base.ref.fingerprint:
        raise IncompatibleBase(
            f"adapter {adapter.manifest.name} was made for {adapter.base}, but this base is {base.ref}: "
            "use the base it was trained on, or train it again on this one."
        )


def check_layers(adapter: Adapter, base: StoredBase) -> None:
    """Raises AdapterNoEffect, IncompatibleBase unless every tensor fits a layer of the base; loads its config only."""
    config, tensors = _read_lora(adapter.path)
    check_fit(adapter.manifest.name, config, tensors, module_shapes(base))


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


def files_of(folder: Path) -> list[Path]:
    """The files of a package folder, by name; without what a killed process left half-written."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not is_temporary(path)]


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if is_temporary(path):
            continue
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
        size = (folder / name).stat().st_size
        if size != entry.size:
            raise DigestMismatch(
                f"{folder / name} has {size:,} bytes, the manifest says {entry.size:,}: fetch it again."
            )
    for name, entry in manifest.files.items():
        path = folder / name
        found, strangers = _sha256_of_weights(path) if name == WEIGHTS_NAME else (sha256_of(path), [])
        if found != entry.sha256:
            raise DigestMismatch(f"{path} has sha256 {found}, the manifest says {entry.sha256}: fetch it again.")
        _check_values(path, strangers)


def _sha256_of_weights(path: Path) -> tuple[str, list[str]]:
    """And the tensors that hold what is no number; in one reading."""
    with _named(path):
        return sha256_and_strangers(path, read_header(path))


def _check_values(path: Path, strangers: list[str]) -> None:
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise InvalidTensors(
            f"{path}: {strangers[0]}{more} holds NaN or infinity: the training run diverged; train again."
        )


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


def _fill_base(folder: Path, base: StoredBase) -> list[str]:
    """PEFT leaves `revision` (the base's) empty and may write a local path as the base; loaders need both right.

    Returns what was filled in, a line each.
    """
    path = folder / CONFIG_NAME
    raw = json.loads(path.read_bytes())
    filled = {"base_model_name_or_path": base.ref.id, "revision": base.ref.hub_revision}
    changed = {key: value for key, value in filled.items() if raw.get(key) != value}
    if changed:
        # Packed before, and for another base: from here until the new manifest it is no package.
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
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
    """Special tokens as the adapter's own tokenizer_config.json has them, else as the base's tokenizer."""
    path = folder / "tokenizer_config.json"
    own = json.loads(path.read_bytes()) if path.is_file() else {}

    def token(name: str) -> str | None:
        found = own.get(name, getattr(tokenizer, name))
        return found.get("content") if isinstance(found, dict) else found

    return Chat(
        template_sha256=sha256_of(folder / TEMPLATE_NAME),
        bos=token("bos_token"),
        eos=token("eos_token"),
        pad=token("pad_token"),
        stop=list(stop),
    )


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    return {
        path.name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size)
        for path in _walk(folder)
        if path.name not in UNLISTED
    }
