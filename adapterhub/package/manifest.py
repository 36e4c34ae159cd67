"""The manifest of an adapter package: its fields, its JSON and its digest. Specified in docs/adapter-format.md."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, Field, ValidationError, model_validator

from adapterhub.errors import InvalidManifest
from adapterhub.files import write_atomic
from adapterhub.strict import Strict, parse_json

FORMAT = 2
"""Written. Every format up to it is read."""
LICENSE_NAMES = AliasChoices("license", "licence")
"""The second one is format 1's; records on disk that were written with it have it, too."""
MANIFEST_NAME = "adapterhub.json"
PROBE_NAME = "probe.json"
"""File of a probe that was recorded by whoever adopted the adapter. It lies beside the manifest, outside the digest."""
MAX_MANIFEST_BYTES = 10_000_000
_Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
_Token = Annotated[int, Field(ge=0)]
_Record = TypeVar("_Record", bound=Strict)


class FileEntry(Strict):
    sha256: str = _Sha256
    size: int = Field(ge=0)
    """Size, in bytes."""


class Quantization(Strict):
    """Quantization of the base's linear layers in training or serving; QLoRA (arXiv 2305.14314), section 3."""

    kind: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quant: bool = True
    """Double quantization of the constants; like the block size, of 4-bit weights only."""
    block_size: int = 64
    """Weights per quantization constant."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @property
    def weights(self) -> str:
        """The weights in a few words: equal for two quantizations exactly when the weights are equal."""
        if self.kind == "none":
            return self.compute_dtype
        if self.kind == "int8":
            return "int8"
        blocks = "" if self.block_size == 64 else f", blocks of {self.block_size}"
        return f"{self.kind}{blocks}{'' if self.double_quant else ', constants in fp32'}"


class BaseEntry(Strict):
    id: str = Field(min_length=1)
    revision: str | None = None
    fingerprint: str = Field(pattern=r"^fp1:[0-9a-f]{64}$")
    quantization: Quantization | None = None
    """None: unknown (an adopted adapter)."""


class Lora(Strict):
    """The update is W + scaling · B A (LoRA, arXiv 2106.09685, section 4.1)."""

    method: Literal["lora", "rslora", "dora", "head"]
    """`head`: a whole output head and no low-rank layer; rank, alpha and scaling then have no meaning."""
    rank: int = Field(ge=1)
    alpha: float
    scaling: float
    """Factor of B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA; patterns override rank and alpha per module."""
    targets: list[str]
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)


class Chat(Strict):
    """Chat template and special tokens of training, with which a server must render and stop."""

    template_sha256: str = _Sha256
    bos: str | None
    eos: str | None
    pad: str | None
    stop: list[str] = Field(default_factory=list)
    """Strings that end an answer, besides `eos`."""
    stop_token_ids: list[_Token] = Field(default_factory=list)
    """Tokens that end an answer: the one with which the template ends a turn. Since format 2."""


class Preference(Strict):
    """Preference tuning on held-out comparisons, before (what training started from) and after."""

    method: Literal["dpo", "kto", "orpo"]
    pairs: int
    """Number of preference pairs."""
    accuracy_before: float
    """Share of pairs whose chosen reply is the likelier one, per token."""
    accuracy_after: float
    loss_before: float
    """Loss of the method."""
    loss_after: float


class Evaluation(Strict):
    """Mean negative log-likelihood per trained token (nats) on questions training never saw.

    After preference tuning the tokens are those of the chosen replies.
    """

    data: str
    tokens: int
    """Number of tokens that the loss is averaged over."""
    base_loss: float
    adapter_loss: float
    preference: Preference | None = None


class Training(Strict):
    recipe_sha256: str = _Sha256
    data_sha256: str = _Sha256
    samples: int
    steps: int
    trained_tokens: int
    seconds: float
    seed: int
    versions: dict[str, str]


class ProbeAnswer(Strict):
    """A fixed prompt, the greedy answer of base and adapter, and the largest first-token logits."""

    prompt: str
    prompt_tokens: list[_Token] = Field(min_length=1)
    """Prompt as the adapter's chat template renders it."""
    tokens: list[_Token] = Field(min_length=1)
    gaps: list[float]
    """Difference of the two largest logits, per token. Where it is small, rounding may choose either."""
    top_tokens: list[_Token] = Field(min_length=1, max_length=20)
    """First tokens with the largest logits, in descending order."""
    top_logits: list[float]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.gaps) != len(self.tokens):
            raise ValueError(f"{len(self.gaps)} gaps for {len(self.tokens)} tokens")
        if len(self.top_logits) != len(self.top_tokens):
            raise ValueError(f"{len(self.top_logits)} top_logits for {len(self.top_tokens)} top_tokens")
        return self


class Probe(Strict):
    """Recorded prompts and answers. A replay must give the same answers within the tolerance of the dtype."""

    dtype: Literal["float32", "bfloat16", "float16"]
    date: str | None = Field(None, pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
    """Date that the chat template rendered; None: it does not read the clock."""
    answers: list[ProbeAnswer] = Field(min_length=1)


class Manifest(Strict):
    format: Literal[1, 2] = 2
    name: str
    license: str | None = Field(None, validation_alias=LICENSE_NAMES)
    """SPDX id."""
    base: BaseEntry
    lora: Lora
    chat: Chat
    training: Training | None = None
    evaluations: list[Evaluation] = Field(default_factory=list)
    probe: Probe | None = None
    """The author's; None: not recorded, or by whoever adopted the adapter (PROBE_NAME)."""
    files: dict[str, FileEntry]

    @cached_property
    def digest(self) -> str:
        """`sha256:` over the canonical JSON of all that serving reads: `base`, `chat`, `files`, `lora`, `probe`.

        Keys that have their default are left out, so a key that is added with a default leaves older digests as they
        are. Format 1 covers `base` and `files` only.
        """
        if self.format == 1:
            return _sha256_of_json({"base": _base_of_format_1(self.base), "files": _plain(self)["files"]})
        plain = _plain(self)
        return _sha256_of_json({key: plain[key] for key in ("base", "chat", "files", "lora", "probe") if key in plain})

    def to_json(self) -> str:
        """Return the text of adapterhub.json."""
        return self.model_dump_json(indent=1) + "\n"


def probe_digest(probe: Probe) -> str:
    """Return `sha256:` over the canonical JSON of a probe."""
    return _sha256_of_json(_plain(probe))


def _base_of_format_1(base: BaseEntry) -> dict[str, Any]:
    """Return the keys that 0.1.0 wrote, with their defaults."""
    weights = {"kind", "double_quant", "block_size", "compute_dtype"}
    quantization = base.quantization and base.quantization.model_dump(include=weights)
    return base.model_dump(include={"id", "revision", "fingerprint"}) | {"quantization": quantization}


def _plain(record: Strict) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude_defaults=True)


def _sha256_of_json(value: dict[str, Any]) -> str:
    """Return `sha256:` over sorted keys, no spaces, UTF-8, and the shortest digits that read back as the number."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Parse `folder/adapterhub.json`. Raises InvalidManifest naming each field that is wrong."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InvalidManifest(
            f"{folder} has no {MANIFEST_NAME}, so it is not a complete adapter package: "
            f"run `adapterhub pack {folder} --base BASE` to make it one."
        )
    return parse_manifest(_bytes_of(path), where=str(path))


def read_probe(folder: Path) -> Probe | None:
    """Parse `folder/probe.json`, the probe of whoever adopted the adapter; None without one. Raises InvalidManifest."""
    path = folder / PROBE_NAME
    return _parsed(Probe, _bytes_of(path), where=str(path)) if path.is_file() else None


def write_probe(folder: Path, probe: Probe) -> None:
    """Write `folder/probe.json`."""
    write_atomic(folder / PROBE_NAME, probe.model_dump_json(indent=1) + "\n")


def _bytes_of(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise InvalidManifest(f"{path} has {size:,} bytes: expected at most {MAX_MANIFEST_BYTES:,}. Pack it again.")
    return path.read_bytes()


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse a manifest. Raises InvalidManifest, in which `where` names the source."""
    return _parsed(Manifest, data, where=where)


def _parsed(kind: type[_Record], data: bytes, *, where: str) -> _Record:
    try:
        raw: Any = parse_json(data)
    except ValueError as error:
        raise InvalidManifest(f"{where} is not JSON ({error}): pull or pack the adapter again.") from error
    if kind is Manifest and isinstance(raw, dict) and raw.get("format") not in range(1, FORMAT + 1):
        raise InvalidManifest(
            f"{where} has format {raw.get('format')!r}: expected 1 to {FORMAT}. Upgrade adapterhub, or pack the "
            "adapter again."
        )
    try:
        # Strict: a number is a number. Read leniently, "NaN" as a string is one, too.
        return kind.model_validate(raw, strict=True)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:10])
        raise InvalidManifest(
            f"{where} is not a valid {kind.__name__.lower()}: {faults}. Upgrade adapterhub, or pack the adapter again."
        ) from error
