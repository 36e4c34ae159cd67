"""Settings are refused where they are written down, before anything is downloaded or loaded."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from adapterhub.adapter import BaseName, StoredBase
from adapterhub.errors import UsageError
from adapterhub.registry.registry import Registry
from serve import engine_choice
from serve.config import (
    Dtype,
    EngineKind,
    HttpLimits,
    LocalEngineConfig,
    SchedulerLimits,
    ServeConfig,
    VllmConfig,
    parse_adapter,
    parse_device,
    parse_dtype,
    parse_engine,
    parse_weight,
)

BASE = BaseName.parse("smollm2-135m-instruct")
URL = "http://127.0.0.1:1"


def serve_config(**settings: Any) -> ServeConfig:
    return ServeConfig(BASE, **settings)


def test_closed_sets_are_parsed_to_their_members() -> None:
    assert [parse_engine(kind) for kind in ("local", "vllm", "auto")] == list(EngineKind)
    assert [parse_dtype(dtype) for dtype in ("bfloat16", "float16", "float32")] == list(Dtype)
    assert [parse_device(device) for device in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_engine, "nonsense", "invalid --engine 'nonsense': expected one of local, vllm, auto."),
        (parse_dtype, "half", "invalid --dtype 'half': expected one of bfloat16, float16, float32."),
        (parse_device, "gpu", "invalid --device 'gpu': expected cpu, cuda or cuda:NUMBER"),
        (parse_device, "cuda:", "expected cpu, cuda or cuda:NUMBER"),
        (parse_device, "cuda:one", "expected cpu, cuda or cuda:NUMBER"),
        (parse_device, "cpu:0", "expected cpu, cuda or cuda:NUMBER"),
        (parse_weight, "captain", "invalid --weight 'captain': expected NAME=NUMBER"),
        (parse_weight, "=2", "expected NAME=NUMBER"),
        (parse_weight, "captain=0", "above 0"),
        (parse_weight, "captain=nan", "above 0"),
        (parse_weight, "captain=inf", "finite"),
        (parse_adapter, "=captain", "Write a name before '='"),
        (parse_adapter, "./folder", "Write NAME=./folder"),
    ],
)
def test_a_value_that_is_not_one_of_the_choices_is_refused_with_them(
    parse: Callable[[str], object], text: str, said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("make", "setting", "bad", "option"),
    [
        (SchedulerLimits, "max_num_seqs", 0, "--max-num-seqs"),
        (SchedulerLimits, "max_batch_tokens", -1, "max_batch_tokens"),
        (SchedulerLimits, "max_prefill_chunk", 0, "max_prefill_chunk"),
        (SchedulerLimits, "max_wait_steps", 0, "max_wait_steps"),
        (LocalEngineConfig, "kv_cache_bytes", 0, "--kv-cache-mb"),
        (LocalEngineConfig, "block_size", 0, "block_size"),
        (LocalEngineConfig, "max_model_len", 1, "--max-model-len"),
        (LocalEngineConfig, "max_lora_rank", 0, "--max-lora-rank"),
        (LocalEngineConfig, "max_queue", -1, "max_queue"),
        (HttpLimits, "max_body_bytes", 0, "--max-body-mb"),
        (serve_config, "port", 65536, "--port"),
        (serve_config, "max_loras", 0, "--max-loras"),
        (serve_config, "max_lora_bytes", 0, "--lora-memory-mb"),
    ],
)
def test_a_number_out_of_range_is_refused_by_the_name_of_its_option(
    make: Callable[..., object], setting: str, bad: int, option: str
) -> None:
    for value in (bad, math.nan, math.inf, -math.inf):
        with pytest.raises(UsageError) as refused:
            make(**{setting: value})
        assert str(refused.value).startswith(f"invalid {option}")
        assert str(value) in str(refused.value)


def test_every_number_of_every_config_is_checked() -> None:
    """A field that is added as a number must be refused as NaN; this test finds it by itself."""
    for kind in (SchedulerLimits, LocalEngineConfig, HttpLimits, ServeConfig):
        numbers = [one.name for one in fields(kind) if one.type in ("int", "float", "int | None", "float | None")]
        assert numbers
        for name in numbers:
            with pytest.raises(UsageError, match="nan"):
                kind(**({"base": BASE} if kind is ServeConfig else {}), **{name: math.nan})


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_not_finite_and_positive_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match="invalid --weight 'captain="):
        serve_config(weights={"captain": weight})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine_kind": "nonsense"}, "invalid --engine 'nonsense'"),
        ({"dtype": "half"}, "invalid --dtype 'half'"),
        ({"device": "tpu"}, "invalid --device 'tpu'"),
        ({"vllm": VllmConfig(endpoints=(URL,))}, "--endpoint belongs to vLLM"),
        ({"vllm": VllmConfig(python=Path("python"), arguments=("--x",))}, "--vllm-python, --vllm-arg belongs to vLLM"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        serve_config(**settings)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"endpoints": (URL,), "python": Path("python")}, "--endpoint does not go with --vllm-python"),
        ({"endpoints": (URL,), "arguments": ("--x",)}, "--endpoint does not go with --vllm-arg"),
        ({"endpoints": ("gpu-1:8000",)}, "invalid --endpoint 'gpu-1:8000'"),
    ],
)
def test_endpoints_are_urls_of_servers_that_run_already(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        VllmConfig(**settings)
    assert said in str(refused.value)


@pytest.mark.parametrize(("kind", "rank"), [(EngineKind.LOCAL, 1025), (EngineKind.VLLM, 513)])
def test_a_rank_that_the_engine_does_not_take_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, kind: EngineKind, rank: int
) -> None:
    def not_now(*_: object, **__: object) -> None:
        raise AssertionError("this costs seconds")

    for costly in ("load_base", "find_vllm"):
        monkeypatch.setattr(engine_choice, costly, not_now)
    asked = serve_config(engine_kind=kind, engine=LocalEngineConfig(max_lora_rank=rank))
    nowhere = StoredBase(tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"--max-lora-rank {rank}"):
        asyncio.run(engine_choice.start_engine(asked, nowhere, Registry(tmp_path), report=lambda line: None))
