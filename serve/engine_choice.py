"""Choose a server's engine, with the reason, and start it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.choice import Choice
from adapterhub.paths import home
from adapterhub.registry.registry import Registry
from serve.config import DeviceKind, Dtype, EngineKind, ServeConfig
from serve.engine import Engine, Precision
from serve.local_engine.cpu.kernels import load_kernels
from serve.local_engine.engine import LocalEngine, check_max_rank
from serve.vllm_engine import compat
from serve.vllm_engine.engine import VllmEngine
from serve.vllm_engine.process import ChildOptions, VllmProcess, find_vllm

Report = Callable[[str], None]

KEY_VARIABLE = "ADAPTERHUB_VLLM_API_KEY"
"""Environment variable with the API key of vLLM servers that are already running."""


async def start_engine(
    config: ServeConfig, base: StoredBase, registry: Registry, *, report: Report
) -> tuple[Engine, Any]:
    """Start the engine that the config asks for; return it and the base's tokenizer.

    Raises UsageError for settings that the engine does not take, and what starting it raises.
    """
    choice = choose_engine(config, registry)
    report(str(choice))
    if choice.value == EngineKind.VLLM:
        return await _start_vllm(config, base, report)
    check_max_rank(config.engine)
    loaded = load_base(base, purpose="serve", dtype=config.dtype or _kernels_dtype(config.device), device=config.device)
    engine = LocalEngine(loaded, config.engine)
    engine.prepare()
    for one in (*loaded.choices, *engine.choices):
        report(str(one))
    return engine, loaded.tokenizer


def choose_engine(config: ServeConfig, registry: Registry) -> Choice:
    """Return `local` or `vllm`, and why."""
    if config.engine_kind == EngineKind.LOCAL:
        return Choice("engine", "local", "one machine, the exact NF4 bits adapters were trained on")
    if config.engine_kind == EngineKind.VLLM:
        return Choice("engine", "vllm", "asked for")
    if config.vllm.endpoints:
        return Choice("engine", "vllm", "its endpoints are given")
    if not torch.cuda.is_available():
        return Choice("engine", "local", "no GPU: here it is faster than vLLM's CPU build (benchmarks/README.md)")
    if config.vllm.python is None and importlib.util.find_spec("vllm") is None:
        return Choice("engine", "local", "there is a GPU, but no vLLM: name its environment with --vllm-python")
    for name, ref in config.adapters:
        reason = compat.unsupported_reason(registry.resolve(ref))
        if reason is not None:
            return Choice("engine", "local", f"there is a GPU with vLLM, but adapter {name} {reason}")
    return Choice("engine", "vllm", "there is a GPU, vLLM is installed, and it serves the adapters given")


async def _start_vllm(config: ServeConfig, base: StoredBase, report: Report) -> tuple[Engine, Any]:
    from transformers import AutoTokenizer

    folder = home() / "vllm" / str(os.getpid())
    _remove_stale_dirs(folder.parent)
    dtype = config.dtype or Dtype.BFLOAT16
    processes = []
    if not config.vllm.endpoints:
        options = ChildOptions(
            max_loras=config.max_loras, max_lora_rank=compat.allowed_rank(config.engine.max_lora_rank), dtype=dtype,
            max_num_seqs=config.engine.limits.max_num_seqs, max_model_len=config.engine.max_model_len,
            kv_cache_bytes=config.engine.kv_cache_bytes, arguments=config.vllm.arguments,
        )  # fmt: skip
        found = find_vllm(config.vllm.python or Path(sys.executable))
        processes.append(VllmProcess(found, base, config.base_name, options, folder))
        report(str(_hazard(processes[0])))
    tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    engine = await VllmEngine.start(
        base, config.base_name, tokenizer, processes=processes, endpoints=config.vllm.endpoints,
        key=os.environ.get(KEY_VARIABLE), folder=folder / "adapters", max_lora_rank=config.engine.max_lora_rank,
        precision=_precision(config, base, dtype), report=report,
    )  # fmt: skip
    return engine, tokenizer


def _remove_stale_dirs(folder: Path) -> None:
    """Remove the folders of killed servers; each is named by its process id."""
    for left in folder.glob("[0-9]*"):
        if not psutil.pid_exists(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)


def _hazard(process: VllmProcess) -> Choice:
    """Return how requests without an adapter are protected from the weights of one (docs/vllm.md)."""
    version = process.found.version
    if not process.found.is_cpu:
        return Choice("vllm lora", "its own", f"vLLM {version} on a GPU")
    if process.found.takes_plugin:
        return Choice("vllm lora", "our plugin", f"the CPU build {version} mixes up rows without an adapter")
    return Choice("vllm lora", "a blank adapter for the base", f"our plugin was not made for the CPU build {version}")


def _precision(config: ServeConfig, base: StoredBase, dtype: str) -> Precision:
    """Return how vLLM stores the base: as its config says, quantized while loading, or unquantized."""
    if config.vllm.endpoints:
        return Precision("unknown", dtype)
    stored = json.loads((base.path / "config.json").read_bytes()).get("quantization_config") or {}
    given = " ".join(config.vllm.arguments).replace("=", " ").split()
    method = given[given.index("--quantization") + 1] if "--quantization" in given[:-1] else stored.get("quant_method")
    # vLLM's bitsandbytes plugin quantizes to NF4 while loading; a stored base records which of the two it is.
    if method == "bitsandbytes":
        return Precision(str(stored.get("bnb_4bit_quant_type", "nf4")), dtype)
    return Precision(method or dtype, dtype)


def _kernels_dtype(device: str | None) -> Dtype | None:
    """Return fp32 where our CPU kernels, which compute in it, will run; None where the device decides."""
    is_cpu = device == DeviceKind.CPU or (device is None and not torch.cuda.is_available())
    return Dtype.FLOAT32 if is_cpu and load_kernels()[0] is not None else None
