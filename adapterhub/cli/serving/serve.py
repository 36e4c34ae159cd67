"""Commands that start servers: `serve` and `demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.hub.hub import obtained
from adapterhub.cli.options import (
    AllowedHosts,
    BaseText,
    HubUrl,
    Port,
    check_program,
    check_url,
    hub_at,
    registry,
    say,
    until_interrupted,
)
from serve.config import Dtype, EngineKind, parse_device


def _check_device(value: str | None) -> str | None:
    return None if value is None else parse_device(value)


def serve(
    base: BaseText,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME=REF", help="Adapter to serve, and its model name. Repeatable."),
    ] = None,
    locked: Annotated[
        Path | None,
        typer.Option(
            "--locked", metavar="FILE", exists=True, dir_okay=False, help="Lock file whose adapters to serve as well."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback an API key is required.")
    ] = "127.0.0.1",
    port: Port = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            exists=True,
            dir_okay=False,
            help="File of API keys, one per line [default: $ADAPTERHUB_API_KEY].",
        ),
    ] = None,
    allowed_host: AllowedHosts = None,
    max_body_mb: Annotated[
        int, typer.Option(help="Maximum size of a request body, in MiB; uploads are exempt.", min=1, max=1 << 20)
    ] = 8,
    max_loras: Annotated[
        int, typer.Option(help="Maximum number of adapters in memory at a time.", min=1, max=100_000)
    ] = 16,
    lora_memory_mb: Annotated[
        int | None,
        typer.Option(
            help="Memory for adapters, in MiB [default: as much as --max-loras adapters need].", min=1, max=1 << 30
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", metavar="NAME=NUMBER", help="Share of an adapter when requests wait; others have 1. Repeatable."
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="NAME", help="Name of an adapter that is never evicted from memory. Repeatable."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Replay each adapter's recorded prompts before it answers.")
    ] = True,
    max_lora_rank: Annotated[int, typer.Option(help="Maximum rank of an adapter.", min=1, max=65_536)] = 64,
    max_num_seqs: Annotated[int, typer.Option(help="Maximum number of sequences in a batch.", min=1, max=65_536)] = 32,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens of prompt and answer together [default: the model's limit, as the cache allows].",
            min=2,
            max=100_000_000,
        ),
    ] = None,
    kv_cache_mb: Annotated[int, typer.Option(help="Memory of the KV cache, in MiB.", min=1, max=1 << 30)] = 512,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type to compute in [default: chosen for the device, and printed].")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda|cuda:N",
            callback=_check_device,
            help="Device to compute on [default: a GPU if there is one].",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads to compute with [default: PyTorch's choice].", min=1, max=4096)
    ] = None,
    engine: Annotated[
        EngineKind, typer.Option(help="Inference engine: local serves the NF4 base in this process; auto chooses one.")
    ] = EngineKind.LOCAL,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoint", metavar="URL", callback=check_url, help="Address of a running vLLM server. Repeatable."
        ),
    ] = None,
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            "--vllm-python", callback=check_program, help="Python of the environment with vLLM [default: this one]."
        ),
    ] = None,
    vllm_arg: Annotated[
        list[str] | None,
        typer.Option("--vllm-arg", metavar="ARG", help="Argument for the vLLM server to start. Repeatable."),
    ] = None,
    hub: HubUrl = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the browser page at /ui.")] = True,
) -> None:
    """Serve one base and many adapters over an OpenAI-compatible API."""
    from adapterhub.adapter import BaseName
    from adapterhub.bases.store import pull_base
    from adapterhub.browser_guard import host_names
    from adapterhub.errors import UsageError
    from serve.api.auth import ApiKeys, check_exposure
    from serve.config import (
        HttpLimits,
        LocalEngineConfig,
        SchedulerLimits,
        ServeConfig,
        VllmConfig,
        parse_adapter,
        parse_weight,
    )

    # Everything that can be wrong with the command line is checked before slow imports and the download.
    keys, names = ApiKeys.read(api_keys), host_names(allowed_host or ())
    check_exposure(host, keys)
    name = BaseName.parse(base)
    adapters = tuple(parse_adapter(text) for text in adapter or ())
    weights = dict(parse_weight(text) for text in weight or ())
    if locked is not None:
        adapters += tuple(obtained(locked, hub).items())
    unexpected = sorted({*weights, *(pin or ())} - {called for called, _ in adapters})
    if unexpected:
        raise UsageError(
            f"unexpected name in --weight or --pin: {', '.join(unexpected)}; expected adapters that --adapter or "
            "--locked gives."
        )
    if page and importlib.util.find_spec("gradio") is None:
        say("note: no page, which needs the ui extra: pip install 'adapterhub[ui]'")
        page = False
    config = ServeConfig(
        base=name,
        adapters=adapters,
        host=host,
        port=port,
        max_loras=max_loras,
        max_lora_bytes=None if lora_memory_mb is None else lora_memory_mb << 20,
        weights=weights,
        pinned=frozenset(pin or ()),
        replay_probe=probe,
        dtype=dtype,
        device=device,
        has_page=page,
        http=HttpLimits(max_body_mb << 20, names),
        engine_kind=engine,
        vllm=VllmConfig(tuple(endpoint or ()), vllm_python, tuple(vllm_arg or ())),
        engine=LocalEngineConfig(
            kv_cache_bytes=kv_cache_mb << 20,
            max_model_len=max_model_len,
            max_lora_rank=max_lora_rank,
            limits=SchedulerLimits(max_num_seqs=max_num_seqs),
        ),
    )
    pull_base(name, report=say)

    import torch

    from serve.server import run_server

    if threads is not None:
        torch.set_num_threads(threads)
    with until_interrupted():
        run_server(config, registry(hub_at(hub)), keys, report=say)


def demo(
    work: Annotated[Path, typer.Option(file_okay=False, help="Folder for everything that the demo creates.")] = Path(
        ".demo"
    ),
    port: Port = 8000,
    leave: Annotated[
        bool, typer.Option("--exit", help="Exit when done instead of leaving the server running.")
    ] = False,
) -> None:
    """Train, publish, serve and query two small adapters."""
    from adapterhub.demo import run_demo

    run_demo(work, port=port, leave=leave)
