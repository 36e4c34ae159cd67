"""The files of an adapter package: which are allowed, and how a package is opened, verified and described.

The format is specified in docs/adapter-format.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.adapter import Adapter
from adapterhub.errors import (
    AdapterNoEffect,
    DigestMismatch,
    InvalidManifest,
    InvalidTensors,
    MissingFile,
    PackageError,
    UnexpectedFile,
    UnsafeFile,
)
from adapterhub.files import expanded, is_temporary, sha256_of
from adapterhub.package.lora_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LoraConfig,
    LoraTensor,
    lora_tensors,
    read_lora_config,
)
from adapterhub.package.manifest import MANIFEST_NAME, PROBE_NAME, Lora, Manifest, read_manifest, read_probe
from adapterhub.package.run_record import LOG_NAME, RECIPE_NAME, REPORT_HEAD, REPORT_NAME
from adapterhub.package.safetensors_header import read_header

if TYPE_CHECKING:
    from adapterhub.package.tensor_scan import Scan

TEMPLATE_NAME = "chat_template.jinja"
CARD_NAME = "README.md"
SIGNATURE_NAME = "adapter.sig"

REQUIRED = (CONFIG_NAME, WEIGHTS_NAME, TEMPLATE_NAME)
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
UNLISTED = (MANIFEST_NAME, CARD_NAME, SIGNATURE_NAME, PROBE_NAME, ".gitattributes")
"""Files that the digest leaves out: they may change, and the adapter stays the same."""
ALLOWED = frozenset((*REQUIRED, *_TOKENIZER, RECIPE_NAME, LOG_NAME, REPORT_NAME, *UNLISTED))

_UNSAFE_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5"}
    | {".py", ".pyc", ".so", ".sh", ".exe", ".dll", ".dylib"}
)

Report = Callable[[str], None]


def open_adapter(folder: Path | str) -> Adapter:
    """Open a packed folder and check all of it: files, digests, tensors. This is what `verify` runs.

    Raises the PackageError that names what is wrong, AdapterUnsupported for methods other than LoRA.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise MissingFile(f"{folder} is not a folder: expected an adapter package (adapterhub.json and its files).")
    check_names(path.relative_to(folder).as_posix() for path in walk_files(folder))
    manifest = read_manifest(folder)
    check_names(manifest.files)
    _check_digests(folder, manifest)
    check_report(folder)
    for name in REQUIRED:
        if name not in manifest.files:
            raise MissingFile(f"{folder / MANIFEST_NAME} does not list {name}: pack the adapter again.")
    _check_agrees(folder, manifest, read_lora(folder)[0].described())
    read_probe(folder)
    return Adapter(folder, manifest)


def _check_agrees(folder: Path, manifest: Manifest, lora: Lora) -> None:
    """Check what the manifest repeats of the files: lists and servers show it, the engine reads the files."""
    # 0.1.0 described heads otherwise, in `method` and `targets`.
    told = set(Lora.model_fields) if manifest.format > 1 else {"rank", "alpha", "scaling"}
    stated, found = (one.model_dump(include=told) for one in (manifest.lora, lora))
    facts = [(f"lora.{key}", stated[key], found[key], CONFIG_NAME) for key in stated]
    template = manifest.files[TEMPLATE_NAME].sha256
    facts.append(("chat.template_sha256", manifest.chat.template_sha256, template, TEMPLATE_NAME))
    for key, here, there, name in facts:
        if here != there:
            raise InvalidManifest(
                f"{folder / MANIFEST_NAME} states {key} {str(here)[:80]}, {name} has {str(there)[:80]}: expected the "
                "same. Fetch it again, or pack it again."
            )


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


@dataclass(frozen=True)
class Description:
    """The manifest of an adapter, and what its tensors add to it."""

    adapter: Adapter
    parameters: int
    dtypes: tuple[str, ...]
    size_bytes: int
    modules: int


def inspect(folder: Path) -> Description:
    """Open (and so verify) a package and count what is in it, from the header alone."""
    adapter = open_adapter(folder)
    _, tensors = read_lora(folder)
    return Description(
        adapter,
        parameters=sum(tensor.info.numel for tensor in tensors),
        dtypes=tuple(sorted({tensor.info.dtype for tensor in tensors})),
        size_bytes=sum(entry.size for entry in adapter.manifest.files.values()),
        modules=len({tensor.module for tensor in tensors}),
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path to an error that does not have it."""
    try:
        yield
    except PackageError as error:
        if str(path.parent) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def read_lora(folder: Path) -> tuple[LoraConfig, list[LoraTensor]]:
    config = read_lora_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise MissingFile(f"{folder} has no {WEIGHTS_NAME}: save the adapter as safetensors (never .bin).")
    with _named(weights):
        return config, lora_tensors(read_header(weights), config)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a package folder, sorted by name, without temporary files of killed processes."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not is_temporary(path)]


def walk_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if is_temporary(path):
            continue
        if path.is_symlink():
            raise UnsafeFile(f"{path} is a symbolic link: packages hold plain files only; copy the file here.")
        if path.is_file():
            yield path


def _check_digests(folder: Path, manifest: Manifest) -> None:
    present = {path.name for path in walk_files(folder)} - set(UNLISTED)
    missing = sorted(set(manifest.files) - present)
    if missing:
        raise MissingFile(f"{folder} lacks {', '.join(missing)}, which its manifest lists. Fetch it again.")
    extra = sorted(present - set(manifest.files))
    if extra:
        raise UnexpectedFile(
            f"{folder} contains {', '.join(extra)}, which its manifest does not list. Remove it, or pack again."
        )
    for name, entry in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != entry.size:
            raise DigestMismatch(
                f"{folder / name} has {size:,} bytes, the manifest lists {entry.size:,}: fetch it again."
            )
    for name, entry in manifest.files.items():
        path = folder / name
        scan = scan_weights(path) if name == WEIGHTS_NAME else None
        found = scan.sha256 if scan else sha256_of(path)
        if found != entry.sha256:
            raise DigestMismatch(f"{path} has sha256 {found}, the manifest lists {entry.sha256}: fetch it again.")
        if scan:
            check_values(path, scan)


def scan_weights(path: Path) -> Scan:
    """Return the weights' sha256 and what its values are, from one read of the file."""
    with _named(path):
        from adapterhub.package.tensor_scan import scan  # numpy, which lists need not wait for

        return scan(path, read_header(path))


def check_values(path: Path, scan: Scan) -> None:
    """Check the values of an adapter's weights. Raises InvalidTensors for NaN and Inf, AdapterNoEffect."""
    if scan.nonfinite:
        more = f" and {len(scan.nonfinite) - 1} more" if len(scan.nonfinite) > 1 else ""
        raise InvalidTensors(
            f"{path}: {scan.nonfinite[0]}{more} contains NaN or Inf: the training run diverged. Train again."
        )
    # With DoRA, the magnitudes may change something too.
    changing = [key for key in read_header(path) if ".lora_A" not in key and not key.endswith(".lora_embedding_A")]
    if changing and set(changing) <= set(scan.zero):
        raise AdapterNoEffect(
            f"{path} changes nothing: B is zero in all of its {len(changing)} layers, as before training. Train the "
            "adapter, or save the weights that were trained."
        )


def check_report(folder: Path) -> None:
    """Check that report.html begins with the policy that forbids scripts: a browser will open it."""
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
