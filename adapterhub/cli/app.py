"""The Typer application. A command's module is imported when the command is called, not before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from adapterhub.cli.commands import SECTIONS, Command, Group
from adapterhub.version import __version__

_SUMMARY = (
    "One quantized base model, a thousand fine-tunes: train, package, publish, serve and chat with LoRA adapters."
)


class LazyCommands(MutableMapping[str, Any]):
    """Commands by name, each built from the table when it is first used."""

    def __init__(self, table: Mapping[str, Command | Group]) -> None:
        self._table = table
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _build(name, self._table[name])
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


class CommandGroup(TyperGroup):
    """A group whose help lists commands under headings without importing them."""

    sections: Mapping[str, Mapping[str, Command | Group]] = SECTIONS

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = LazyCommands({name: entry for part in self.sections.values() for name, entry in part.items()})

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, in the order of the table."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands of each section under its heading, in columns of one width."""
        width = max(map(len, self.commands))
        for heading, entries in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<{width}}", entry.summary) for name, entry in entries.items()])


def _typer(name: str, summary: str, group: type[CommandGroup]) -> typer.Typer:
    return typer.Typer(
        name=name,
        cls=group,
        help=summary,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def _build(name: str, entry: Command | Group) -> Any:
    if isinstance(entry, Group):
        subgroup = type("Subgroup", (CommandGroup,), {"sections": {"Commands": entry.commands}})
        return typer.main.get_group(_typer(name, entry.summary, subgroup))
    module, _, function = entry.function.partition(":")
    holder = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    holder.command(name, short_help=entry.summary, epilog=f"Example: {entry.example}")(
        getattr(import_module(f"adapterhub.cli.{module}"), function)
    )
    return typer.main.get_command(holder)


app = _typer("adapterhub", _SUMMARY, CommandGroup)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adapterhub {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
