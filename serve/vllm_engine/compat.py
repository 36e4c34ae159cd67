"""The limits of vLLM for adapters, requests, settings and servers: one table, and the checks that read it.

docs/vllm.md shows the same table. Behind a limit is what vLLM answers with a 500, or accepts and then answers wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from adapterhub.adapter import Adapter
from adapterhub.compatibility import Shapes, check_compatible
from adapterhub.errors import AdapterUnsupported, UsageError
from adapterhub.package.lora_config import WEIGHTS_NAME, LoraConfig, lora_tensors, read_lora_config
from adapterhub.package.safetensors_header import read_header
from serve.adapters.weights import read_weights
from serve.engine import GenerationRequest

TESTED_VERSIONS = ("0.32.0",)
"""Versions of vLLM that the tests ran against; another one is reported and used."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""

GUIDED_DECODING_KEYS = {"json_schema": "json", "regex": "regex", "grammar": "grammar"}
"""Kind of guided decoding -> key of vLLM's `structured_outputs`."""

KEEP_ALL_TOKENS = -1
"""Value of vLLM's `top_k` for no limit."""


class Subject(StrEnum):
    """What a limit is about."""

    ADAPTER = "adapter"
    REQUEST = "request"
    SETTING = "setting"
    SERVER = "server"


@dataclass(frozen=True)
class Limit:
    """One thing that vLLM does not take."""

    subject: Subject
    feature: str
    """Name of it, as docs/vllm.md writes it."""
    message: str
    """Text of the error, with {placeholders}; an adapter's follows its name."""

    def text(self, **values: object) -> str:
        """Return the message with its placeholders filled in."""
        return self.message.format(**values)


DORA = Limit(Subject.ADAPTER, "DoRA", "uses DoRA, which vLLM does not serve")
SAVED_MODULES = Limit(
    Subject.ADAPTER,
    "whole modules (`modules_to_save`)",
    "has full weights of {modules} (modules_to_save), which vLLM does not serve",
)
RANK = Limit(Subject.ADAPTER, f"a rank above {RANKS[-1]}", f"has rank {{rank}}, vLLM takes at most {RANKS[-1]}")
MIX = Limit(
    Subject.REQUEST,
    "several adapters, or a scale other than 1",
    "vLLM applies one adapter at its own scale: ask for one, or serve with --engine local, which mixes them.",
)
MAX_LORA_RANK = Limit(
    Subject.SETTING,
    f"`--max-lora-rank` above {RANKS[-1]}",
    f"invalid --max-lora-rank {{rank}}: expected at most {RANKS[-1]}, vLLM's largest.",
)
LORA_DISABLED = Limit(
    Subject.SERVER,
    "adapters, without `--enable-lora`",
    "vLLM at {url} serves no adapters: start it with --enable-lora.",
)
NO_RUNTIME_LOADING = Limit(
    Subject.SERVER,
    "loading at run time, without `VLLM_ALLOW_RUNTIME_LORA_UPDATING`",
    "vLLM at {url} loads no adapters at run time: start it with --enable-lora and the environment variable "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.",
)
OTHER_DISK = Limit(
    Subject.SERVER,
    "a folder on another disk",
    "vLLM at {url} finds no adapter at {folder}: it must see the same disk as this server.",
)
VERSION = Limit(
    Subject.SERVER,
    "a version other than " + ", ".join(TESTED_VERSIONS),
    "vLLM {version} at {url} is not a version this was tested with (" + ", ".join(TESTED_VERSIONS) + ").",
)

LIMITS = (DORA, SAVED_MODULES, RANK, MIX, MAX_LORA_RANK, LORA_DISABLED, NO_RUNTIME_LOADING, OTHER_DISK, VERSION)
"""Every limit, in the order of docs/vllm.md."""


def unsupported_reason(adapter: Adapter) -> str | None:
    """Return why vLLM does not serve an adapter, in words that follow its name; read from its config alone."""
    return _reason(read_lora_config(adapter.path))


def _reason(config: LoraConfig) -> str | None:
    rank = max(config.rank, *config.rank_pattern.values(), 0)
    if config.use_dora:
        return DORA.text()
    if config.saved_modules:
        return SAVED_MODULES.text(modules=", ".join(config.saved_modules))
    return RANK.text(rank=rank) if rank > RANKS[-1] else None


def check_adapter(adapter: Adapter, shapes: Shapes, *, max_rank: int) -> None:
    """Check an adapter's method, rank, tensors, shapes and depth.

    Raises AdapterUnsupported, RankTooLarge, InvalidTensors, AdapterNoEffect, IncompatibleBase.
    """
    name, config = adapter.manifest.name, read_lora_config(adapter.path)
    reason = _reason(config)
    if reason is not None:
        raise AdapterUnsupported(f"adapter {name} {reason}: use --engine local, or train plain LoRA.")
    read_weights(adapter, device=torch.device("cpu"), dtype_of=lambda dtype: dtype, max_rank=max_rank)
    check_compatible(name, config, lora_tensors(read_header(adapter.path / WEIGHTS_NAME), config), shapes)


def check_request(request: GenerationRequest) -> None:
    """Raise UsageError for what vLLM does not do within one request."""
    if len(request.adapters) > 1 or any(adapter.scale != 1 for adapter in request.adapters):
        raise UsageError(MIX.text())


def allowed_rank(max_lora_rank: int) -> int:
    """Return the smallest of vLLM's `RANKS` that is large enough. Raises UsageError."""
    allowed = next((rank for rank in RANKS if rank >= max_lora_rank), None)
    if allowed is None:
        raise UsageError(MAX_LORA_RANK.text(rank=max_lora_rank))
    return allowed
