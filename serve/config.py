"""Every setting of a server, frozen and checked; each default is written here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from adapterhub.adapter import AdapterRef, BaseName
from adapterhub.errors import UsageError


class EngineKind(StrEnum):
    """Values of `--engine`."""

    LOCAL = "local"
    VLLM = "vllm"
    AUTO = "auto"


class Dtype(StrEnum):
    """Values of `--dtype`: the floating-point format a model computes in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class DeviceKind(StrEnum):
    """Kinds of device that `--device` names; CUDA devices may have a number, as in `cuda:1`."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True)
class SchedulerLimits:
    """How much the scheduler puts into one step. Raises UsageError for a number out of range."""

    max_num_seqs: int = 32
    """Maximum number of running sequences."""
    max_batch_tokens: int = 512
    """Maximum number of tokens computed in one step."""
    max_prefill_chunk: int = 256
    """Maximum number of prompt tokens in one step, over all sequences; it bounds how long decoding waits."""
    max_wait_steps: int = 16
    """Steps without a computed token after which a group that has requests is starved and is admitted first."""
    cuts_prompts: bool = True
    """Whether a prompt may be computed in several steps; a whole one may be longer than `max_prefill_chunk`."""

    def __post_init__(self) -> None:
        _check_range("--max-num-seqs", self.max_num_seqs, minimum=1)
        _check_range("max_batch_tokens", self.max_batch_tokens, minimum=1)
        _check_range("max_prefill_chunk", self.max_prefill_chunk, minimum=1)
        _check_range("max_wait_steps", self.max_wait_steps, minimum=1)

    @property
    def max_running(self) -> int:
        """Maximum number of running sequences; a step has a token for each of them."""
        return min(self.max_num_seqs, self.max_batch_tokens)


@dataclass(frozen=True)
class LocalEngineConfig:
    """Settings of the local engine. Raises UsageError for a number out of range."""

    kv_cache_bytes: int = 512 << 20
    """Size of the KV cache, in bytes."""
    block_size: int = 16
    """Tokens per KV block."""
    max_model_len: int | None = None
    """Maximum length of prompt and answer, in tokens; None: the model's own, as far as the KV cache holds it."""
    max_lora_rank: int = 64
    """Largest LoRA rank that is loaded."""
    max_queue: int = 1024
    """Maximum number of waiting requests; further ones are refused."""
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)

    def __post_init__(self) -> None:
        _check_range("--kv-cache-mb (in bytes)", self.kv_cache_bytes, minimum=1)
        _check_range("block_size", self.block_size, minimum=1)
        if self.max_model_len is not None:
            _check_range("--max-model-len", self.max_model_len, minimum=2)
        _check_range("--max-lora-rank", self.max_lora_rank, minimum=1)
        _check_range("max_queue", self.max_queue, minimum=1)


@dataclass(frozen=True)
class HttpLimits:
    """What a server accepts from its clients. Raises UsageError for a number out of range."""

    max_body_bytes: int = 8 << 20
    """Maximum size of a request body, uploaded adapters aside, in bytes."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names, besides this machine's own, by which requests may reach a server without API keys."""

    def __post_init__(self) -> None:
        _check_range("--max-body-mb (in bytes)", self.max_body_bytes, minimum=1)


@dataclass(frozen=True)
class VllmConfig:
    """Settings of `--engine vllm`: running servers, or the environment to start one from.

    Raises UsageError for both together, and for an endpoint that is not an HTTP URL.
    """

    endpoints: tuple[str, ...] = ()
    """URLs of vLLM servers that are already running."""
    python: Path | None = None
    """Python of the environment that has vLLM; None: this one."""
    arguments: tuple[str, ...] = ()
    """Further arguments for the vLLM server that is started."""

    def __post_init__(self) -> None:
        for url in self.endpoints:
            if not url.lower().startswith(("http://", "https://")):
                raise UsageError(
                    f"invalid --endpoint {url!r}: expected a URL that starts with http:// or https://. "
                    "Write it as in http://gpu-1:8000."
                )
        if self.endpoints and len(self.given) > 1:
            raise UsageError(
                f"--endpoint does not go with {', '.join(self.given[1:])}: expected running servers, or a vLLM to "
                "start. Leave out one of them."
            )

    @property
    def given(self) -> tuple[str, ...]:
        """The options that are set, as on the command line."""
        options = {"--endpoint": self.endpoints, "--vllm-python": self.python, "--vllm-arg": self.arguments}
        return tuple(option for option, value in options.items() if value)


@dataclass(frozen=True)
class ServeConfig:
    """All settings of a server. Raises UsageError for what can be refused without loading anything."""

    base: BaseName
    adapters: tuple[tuple[str, AdapterRef], ...] = ()
    """Adapters to serve: (name used in requests, reference)."""
    host: str = "127.0.0.1"
    port: int = 8000
    """TCP port; 0 picks a free one."""
    max_loras: int = 16
    """Maximum number of resident adapters; others are loaded when a request names them."""
    max_lora_bytes: int | None = None
    """Maximum size of all resident adapters together, in bytes; None: bounded by `max_loras` alone."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Adapter name -> share of the engine relative to other adapters when requests wait; 1 by default."""
    pinned: frozenset[str] = frozenset()
    """Names of adapters that are never evicted."""
    replay_probe: bool = True
    """Whether an adapter must reproduce its recorded probe before it answers requests."""
    dtype: Dtype | None = None
    """Format the model computes in; None: chosen for the device."""
    device: str | None = None
    """Device to load the base on, as `parse_device` returns it; None: a GPU if there is one."""
    has_page: bool = True
    """Whether the browser page is served at /ui."""
    http: HttpLimits = field(default_factory=HttpLimits)
    engine: LocalEngineConfig = field(default_factory=LocalEngineConfig)
    engine_kind: EngineKind = EngineKind.LOCAL
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        parse_engine(self.engine_kind)
        if self.dtype is not None:
            parse_dtype(self.dtype)
        if self.device is not None:
            parse_device(self.device)
        _check_range("--port", self.port, minimum=0, maximum=65535)
        _check_range("--max-loras", self.max_loras, minimum=1)
        if self.max_lora_bytes is not None:
            _check_range("--lora-memory-mb (in bytes)", self.max_lora_bytes, minimum=1)
        for name, weight in self.weights.items():
            _check_weight(f"{name}={weight}", weight)
        if self.engine_kind == EngineKind.LOCAL and self.vllm.given:
            raise UsageError(
                f"{', '.join(self.vllm.given)} belongs to vLLM: expected --engine vllm or auto beside it. "
                "Add --engine vllm."
            )

    @property
    def base_name(self) -> str:
        """The name requests use for the base: as given on the command line, a folder by its last part."""
        return self.base.folder.resolve().name if self.base.folder else str(self.base.name)


def parse_engine(text: str) -> EngineKind:
    """Parse `--engine`. Raises UsageError."""
    return _parse_choice("--engine", text, EngineKind)


def parse_dtype(text: str) -> Dtype:
    """Parse `--dtype`. Raises UsageError."""
    return _parse_choice("--dtype", text, Dtype)


def parse_device(text: str) -> str:
    """Parse `--device`: `cpu`, `cuda`, or `cuda:` and a number. Raises UsageError."""
    kind, colon, number = text.partition(":")
    is_numbered = kind == DeviceKind.CUDA and number.isascii() and number.isdigit()
    if kind not in [str(one) for one in DeviceKind] or (colon and not is_numbered):
        raise UsageError(
            f"invalid --device {text!r}: expected {', '.join(DeviceKind)} or cuda:NUMBER. Leave out --device to have "
            "it chosen."
        )
    return text


def parse_weight(text: str) -> tuple[str, float]:
    """Parse `--weight`: `name=number`, the number above 0. Raises UsageError."""
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name:
        weight = math.nan
    _check_weight(text, weight)
    return name, weight


def parse_adapter(text: str) -> tuple[str, AdapterRef]:
    """Parse `--adapter`: `name=ref`, or `ref` alone, whose last part is the name. Raises InvalidRef, UsageError."""
    name, equals, ref = text.partition("=")
    if equals:
        if not name:
            raise UsageError(f"invalid --adapter {text!r}: expected NAME=REF. Write a name before '='.")
        return name, AdapterRef.parse(ref)
    parsed = AdapterRef.parse(text)
    if parsed.name is None:
        raise UsageError(f"--adapter {text!r} has no name for requests to use: expected NAME=REF. Write NAME={text}.")
    return parsed.name.rpartition("/")[2], parsed


_Kind = TypeVar("_Kind", bound=StrEnum)


def _parse_choice(option: str, text: str, kind: type[_Kind]) -> _Kind:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"invalid {option} {text!r}: expected one of {', '.join(kind)}.") from None


def _check_range(option: str, value: float, *, minimum: int, maximum: float = math.inf) -> None:
    if not (math.isfinite(value) and minimum <= value <= maximum):
        limits = f"{minimum} or more" if maximum == math.inf else f"{minimum} to {maximum}"
        raise UsageError(f"invalid {option} {value}: expected a number, {limits}.")


def _check_weight(text: str, weight: float) -> None:
    if not 0 < weight < math.inf:
        raise UsageError(f"invalid --weight {text!r}: expected NAME=NUMBER with a finite number above 0.")
