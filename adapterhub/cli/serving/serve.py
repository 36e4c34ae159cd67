"""Verbs that serve: serve, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.hub.hub import obtained
from adapterhub.cli.options import AllowedHosts, BaseText, HubUrl, hub_at, registry, say, until_interrupted


@app.command()
def serve(
    base: BaseText,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", metavar="NAME=REF", help="Load an adapter; may be repeated.")
    ] = None,
    locked: Annotated[
        Path | None, typer.Option("--locked", metavar="FILE", help="Load exactly what a lock file lists, too.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Interface to listen on; beyond loopback an API key is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", help="File of API keys, one a line [default: $ADAPTERHUB_API_KEY].")
    ] = None,
    allowed_host: AllowedHosts = None,
    max_body_mb: Annotated[int, typer.Option(help="Largest request body, uploads aside, MiB.", min=1)] = 8,
    max_loras: Annotated[int, typer.Option(help="Adapters resident at once.", min=1)] = 16,
    lora_memory_mb: Annotated[
        int | None, typer.Option(help="Memory for resident adapters, MiB [default: bounded by --max-loras].", min=1)
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option("--weight", metavar="NAME=NUMBER", help="An adapter's share when requests wait; may be repeated."),
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option("--pin", metavar="NAME", help="Keep an adapter resident; may be repeated.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Ask each adapter its recorded prompts before it answers.")
    ] = True,
    max_lora_rank: Annotated[int, typer.Option(help="Largest rank taken.", min=1)] = 64,
    max_num_seqs: Annotated[int, typer.Option(help="Requests computed together.", min=1)] = 32,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer.", min=2)] = None,
    kv_cache_mb: Annotated[int, typer.Option(help="Memory for keys and values, MiB.", min=1)] = 512,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32 [default: chosen].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: chosen].")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads to compute with [default: torch's].", min=1)] = None,
    engine: Annotated[
        str, typer.Option(help="local (NF4, on this machine), vllm, or auto: chosen, with the reason.")
    ] = "local",
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", metavar="URL", help="A vLLM server that runs already; may be repeated."),
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", help="Python of vLLM's environment [default: this one].")
    ] = None,
    vllm_arg: Annotated[
        list[str] | None,
        typer.Option("--vllm-arg", metavar="ARG", help="Passed on to the vLLM we start; may be repeated."),
    ] = None,
    hub: HubUrl = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The browser page at /ui.")] = True,
) -> None:
    """Serve one base and many adapters through an OpenAI-compatible API."""
    from adapterhub.adapter import BaseName
    from adapterhub.bases.store import pull_base
    from adapterhub.browser_guard import host_names
    from adapterhub.errors import UsageError
    from serve.api.auth import ApiKeys, check_exposure

    keys, names = ApiKeys.read(api_keys), host_names(allowed_host or ())
    check_exposure(host, keys)  # before seconds go into imports and minutes into a download

    from serve.config import (
        ServeConfig,
        VllmConfig,
        parse_adapter,
        parse_device,
        parse_dtype,
        parse_engine,
        parse_weight,
    )

    name = BaseName.parse(base)
    adapters = tuple(parse_adapter(text) for text in adapter or ())
    if locked is not None:
        adapters += tuple(obtained(locked, hub).items())
    weights = dict(parse_weight(text) for text in weight or ())
    strangers = sorted({*weights, *(pin or ())} - {called for called, _ in adapters})
    if strangers:
        raise UsageError(
            f"--weight and --pin name adapters given by --adapter or --locked; {', '.join(strangers)} is not one."
        )
    pull_base(name, report=say)

    import torch

    from serve.config import HttpLimits, LocalEngineConfig, SchedulerLimits
    from serve.server import run_server

    if threads is not None:
        torch.set_num_threads(threads)
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
        dtype=None if dtype is None else parse_dtype(dtype),
        device=None if device is None else parse_device(device),
        has_page=page,
        http=HttpLimits(max_body_mb << 20, names),
        engine_kind=parse_engine(engine),
        vllm=VllmConfig(tuple(endpoint or ()), vllm_python, tuple(vllm_arg or ())),
        engine=LocalEngineConfig(
            kv_cache_bytes=kv_cache_mb << 20,
            max_model_len=max_model_len,
            max_lora_rank=max_lora_rank,
            limits=SchedulerLimits(max_num_seqs=max_num_seqs),
        ),
    )
    with until_interrupted():
        run_server(config, registry(hub_at(hub)), keys, report=say)


@app.command()
def demo(
    work: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(".demo"),
    port: Annotated[int, typer.Option(help="Port of the server it leaves running.")] = 8000,
    leave: Annotated[bool, typer.Option("--exit", help="End by itself instead of leaving the server running.")] = False,
) -> None:
    """Walk the whole road: train two adapters, pack, push, pull, serve, and ask them both."""
    from adapterhub.demo import run_demo

    run_demo(work, port=port, leave=leave)
