"""Commands that are clients of a server: `chat` in the terminal, `page` in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub.cli.options import AllowedHosts, AsJson, Port, check_finite, check_url, say, until_interrupted

ServerUrl = Annotated[str, typer.Option(callback=check_url, help="Address of the OpenAI-compatible API; ends in /v1.")]
_DEFAULT_URL = "http://127.0.0.1:8000/v1"


def chat(
    model: Annotated[str | None, typer.Argument(help="Adapter to chat with [default: the base model].")] = None,
    url: ServerUrl = _DEFAULT_URL,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Prompt to send once; prints the answer and exits.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum answer length, in tokens.", min=1, max=1_000_000)] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            help="Sampling temperature; 0 always picks the likeliest token.", min=0.0, max=2.0, callback=check_finite
        ),
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            help="Nucleus sampling: probability mass to sample from.", min=0.01, max=1.0, callback=check_finite
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed for reproducible output.", min=-(2**63), max=2**63 - 1),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a served model in the terminal."""
    from adapterhub.errors import UsageError
    from serve.client import Sampling
    from serve.terminal.chat import ChatOptions, run_chat

    if as_json and prompt is None:
        raise UsageError("--json prints a single answer: it needs --prompt TEXT.")
    sampling = Sampling(temperature, max_tokens, top_p, seed)
    run_chat(ChatOptions(url, model, system, sampling), prompt=prompt, as_json=as_json)


def page(
    url: ServerUrl = _DEFAULT_URL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback the API must require a key.")
    ] = "127.0.0.1",
    port: Port = 7860,
    allowed_host: AllowedHosts = None,
) -> None:
    """Open the browser page for an OpenAI-compatible server.

    The page is a client: it loads no model and works with vLLM's server, too.
    """
    from adapterhub.browser_guard import host_names

    names = host_names(allowed_host or ())

    from serve.ui.app import run_page

    with until_interrupted():
        run_page(url, host=host, port=port, allowed_hosts=names, report=say)
