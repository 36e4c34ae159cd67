"""The Typer application the verbs are hung on."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterhub import __version__

app = typer.Typer(
    name="adapterhub",
    help="One quantized base model, a thousand fine-tunes: train, pack, push, pull, serve and chat with LoRA adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
base_app = typer.Typer(help="Base models on this machine.", no_args_is_help=True)
hub_app = typer.Typer(help="A Hub of your own.", no_args_is_help=True)
app.add_typer(base_app, name="base")
app.add_typer(hub_app, name="hub")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adapterhub {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
