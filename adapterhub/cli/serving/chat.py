"""Verbs for people in front of a server: chat in the terminal, page in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import AllowedHosts, AsJson, say, until_interrupted

ServerUrl = Annotated[str, typer.Option(help="The server's API.")]
_DEFAULT_URL = "http://127.0.0.1:8000/v1"


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Adapter to talk to [default: the base].")] = None,
    url: ServerUrl = _DEFAULT_URL,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once and print the answer.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0, max=2.0)] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Draw from this share of the likeliest tokens.", min=0.01, max=1.0)
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same draw each time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a served adapter in the terminal."""
    from adapterhub.errors import UsageError
    from serve.client import Sampling
    from serve.terminal.chat import ChatOptions, run_chat

    if as_json and prompt is None:
        raise UsageError("--json prints one answer as JSON: it needs --prompt.")
    sampling = Sampling(temperature, max_tokens, top_p, seed)
    run_chat(ChatOptions(url, model, system, sampling), prompt=prompt, as_json=as_json)


@app.command()
def page(
    url: ServerUrl = _DEFAULT_URL,
    host: Annotated[str, typer.Option(help="Interface to listen on; beyond loopback the API must want a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 7860,
    allowed_host: AllowedHosts = None,
) -> None:
    """Open the browser page before any OpenAI-compatible server, vLLM's included; it loads no model."""
    from adapterhub.browser_guard import host_names

    names = host_names(allowed_host or ())

    from serve.ui.app import run_page

    with until_interrupted():
        run_page(url, host=host, port=port, allowed_hosts=names, report=say)
