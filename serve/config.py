"""Everything a server is started with, frozen; each default is written here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from adapterhub.adapter import AdapterRef, BaseName
from adapterhub.errors import UsageError

EngineKind = Literal["local", "vllm", "auto"]


@dataclass(frozen=True)
class SchedulerLimits:
    max_num_seqs: int = 32
    """sequences that run together"""
    max_batch_tokens: int = 512
    """tokens computed in one step"""
    max_prefill_chunk: int = 256
    """prompt tokens of all sequences in a step, so that decoding never waits longer than this"""
    max_wait_steps: int = 16
    """Steps without a token after which a group that has requests is given a place and prompt tokens first."""

    @property
    def num_places(self) -> int:
        """Sequences that run together; a step has a token for each of them."""
        return min(self.max_num_seqs, self.max_batch_tokens)


@dataclass(frozen=True)
class LocalEngineConfig:
    kv_cache_bytes: int = 512 << 20
    block_size: int = 16
    """tokens per KV block"""
    max_model_len: int | None = None
    """None: what the model was made for, as far as the cache holds it"""
    max_lora_rank: int = 64
    max_queue: int = 1024
    """waiting requests before new ones are refused"""
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)


@dataclass(frozen=True)
class HttpLimits:
    """What a server takes from its clients."""

    max_body_bytes: int = 8 << 20
    """size of a request body, uploads of adapters aside"""
    allowed_hosts: tuple[str, ...] = ()
    """names besides this machine's own that requests may reach a server without keys by"""


@dataclass(frozen=True)
class VllmConfig:
    """Of --engine vllm: servers that run already, or the environment to start one from."""

    endpoints: tuple[str, ...] = ()
    python: Path | None = None
    """None: this Python's own environment"""
    arguments: tuple[str, ...] = ()
    """passed on to the vLLM we start"""


@dataclass(frozen=True)
class ServeConfig:
    base: BaseName
    adapters: tuple[tuple[str, AdapterRef], ...] = ()
    """(name requests use, what to load)"""
    host: str = "127.0.0.1"
    port: int = 8000
    max_loras: int = 16
    """adapters resident in the engine; more may be named, they are loaded when asked for"""
    max_lora_bytes: int | None = None
    """bytes of all resident adapters together; None: as many as max_loras allows"""
    weights: Mapping[str, float] = field(default_factory=dict)
    """adapter name -> its share beside others when requests wait; 1 where none is given"""
    pinned: frozenset[str] = frozenset()
    """names whose adapters are never evicted"""
    replay_probe: bool = True
    """ask each adapter its recorded prompts before it answers anybody"""
    dtype: str | None = None
    device: str | None = None
    has_page: bool = True
    """the browser page at /ui"""
    http: HttpLimits = field(default_factory=HttpLimits)
    engine: LocalEngineConfig = field(default_factory=LocalEngineConfig)
    engine_kind: EngineKind = "local"
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def base_name(self) -> str:
        """What requests call the base: as the operator wrote it, a folder by its last part."""
        return self.base.folder.resolve().name if self.base.folder else str(self.base.name)


def parse_engine(text: str) -> EngineKind:
    """Raises UsageError."""
    for kind in get_args(EngineKind):
        if text == kind:
            return kind  # type: ignore[no-any-return]
    raise UsageError(f"--engine {text!r} is none of {', '.join(get_args(EngineKind))}.")


def parse_weight(text: str) -> tuple[str, float]:
    """`name=number`, the number above 0. Raises UsageError."""
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not name or not 0 < weight < math.inf:
        raise UsageError(f"--weight {text!r} is not NAME=NUMBER with a number above 0.")
    return name, weight


def parse_adapter(text: str) -> tuple[str, AdapterRef]:
    """`name=ref`, or just `ref` whose last part becomes the name. Raises InvalidRef, UsageError."""
    name, equals, ref = text.partition("=")
    if equals:
        if not name:
            raise UsageError(f"{text!r} has no name before '=': expected NAME=REF.")
        return name, AdapterRef.parse(ref)
    parsed = AdapterRef.parse(text)
    if parsed.name is None:
        raise UsageError(f"{text!r} needs a name to be asked for by: write NAME={text}.")
    return parsed.name.rpartition("/")[2], parsed
