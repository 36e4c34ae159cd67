"""Options, checks and output helpers that several commands share."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from adapterhub.errors import printable

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter, BaseRef, StoredBase
    from adapterhub.hub.client import Hub
    from adapterhub.registry.registry import Registry

T = TypeVar("T")

_URL = re.compile(
    r"(?i:https?)://(?:[^\s/?#@]*@)?(?:\[[0-9a-fA-F:.]+(?:%[\w.%-]+)?\]|[^\s/?#@:\[\]]+)(?::([0-9]{1,5}))?(?:[/?#]\S*)?"
)
_HOST_PORT = re.compile(r".+:[1-9][0-9]{0,4}")
_NODES = re.compile(r"[1-9][0-9]*(?::[1-9][0-9]*)?")


def _each(value: T | list[T] | None) -> list[T]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def check_finite(value: float | None) -> float | None:
    """Refuse NaN and infinity, which pass every minimum and maximum. Raises BadParameter."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def check_positive(value: float | None) -> float | None:
    """Refuse anything but a finite number above 0. Raises BadParameter."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not a finite number above 0.")
    return value


def check_url(value: Any) -> Any:
    """Refuse an address without http:// or https:// and a host. Raises BadParameter."""
    for text in _each(value):
        found = _URL.fullmatch(text)
        if found is None or int(found[1] or 0) > 65535:
            raise typer.BadParameter(f"{text!r} is not a URL: expected http://HOST[:PORT] or https://HOST[:PORT].")
    return value


def check_host_port(value: str | None) -> str | None:
    """Refuse an address that is not HOST:PORT. Raises BadParameter."""
    if value is not None and (not _HOST_PORT.fullmatch(value) or int(value.rpartition(":")[2]) > 65535):
        raise typer.BadParameter(f"{value!r} is not an address: expected HOST:PORT.")
    return value


def check_nodes(value: str) -> str:
    """Refuse anything but a number of machines, or MIN:MAX. Raises BadParameter."""
    if not _NODES.fullmatch(value):
        raise typer.BadParameter(f"{value!r} is not a number of machines: expected N or MIN:MAX.")
    return value


def check_program(value: Path | None) -> Path | None:
    """Refuse a program that is neither a file nor on PATH. Raises BadParameter."""
    if value is not None and shutil.which(value) is None:
        raise typer.BadParameter(f"'{value}' is not a program: expected the path of an executable file.")
    return value


def check_expected(value: str | None) -> str | None:
    """Refuse what cannot be the digest that an alias points to. Raises BadParameter."""
    if value is not None and not re.fullmatch(r"nothing|sha256:[0-9a-f]{8,64}", value):
        raise typer.BadParameter(f"{value!r} is not a digest: expected sha256:<8 or more hex digits> or 'nothing'.")
    return value


def check_name(value: str | None) -> str | None:
    """Refuse what is not the name of an adapter. Raises BadParameter."""
    from adapterhub.adapter import AdapterRef
    from adapterhub.errors import InvalidRef

    if value is not None:
        try:
            is_name = AdapterRef.parse(value).name == value
        except InvalidRef:
            is_name = False
        if not is_name:
            raise typer.BadParameter(f"{value!r} is not a name: expected NAME or OWNER/NAME.")
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
HubUrl = Annotated[
    str | None,
    typer.Option(
        "--hub",
        metavar="URL",
        callback=check_url,
        help="Address of the Hub [default: $HF_ENDPOINT, else huggingface.co].",
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="Host name under which a proxy forwards requests to this server. Repeatable.",
    ),
]
BaseText = Annotated[
    str,
    typer.Option("--base", help="Base model: a known name, a Hub id (owner/name[@revision]) or a folder."),
]
AdapterName = Annotated[
    str | None, typer.Option("--name", callback=check_name, help="Name in the registry [default: the manifest's name].")
]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)]
AnyRef = Annotated[
    str, typer.Argument(help="Adapter: a name (name[@revision]), a digest, or a folder that starts with ./ or /.")
]


def say(line: str) -> None:
    """Print a note for the user to stderr, apart from the data; what others wrote in it is escaped."""
    typer.echo(printable(line), err=True)


def show(line: object = "") -> None:
    """Print a line of data to stdout; what others wrote in it is escaped."""
    typer.echo(printable(str(line)))


def show_json(value: Any, *, indent: int | None = 1) -> None:
    """Print data as JSON in ASCII, in which every control character is escaped."""
    typer.echo(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"))


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Treat Ctrl+C in the block as the normal way to stop a server."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped")


def hub_at(endpoint: str | None) -> Hub:
    """Return the Hub at `endpoint`, else the one of the environment, with its token."""
    from adapterhub.hub.client import Hub

    return Hub.from_environment(endpoint)


def registry(hub: Hub | None = None) -> Registry:
    """Return the registry on this machine, which downloads missing adapters from `hub`."""
    from adapterhub.registry.registry import Registry

    return Registry.default(hub)


def resolved(ref: str, hub: Hub | None = None) -> Adapter:
    """Return the verified adapter that `ref` names. Raises InvalidRef, AdapterNotFound, PackageError."""
    from adapterhub.adapter import AdapterRef

    parsed = AdapterRef.parse(ref)
    if parsed.name is not None and Path(ref).is_dir():
        say(f"note: {ref} is read as a name; for the folder write ./{ref}")
    return registry(hub).open(parsed)


def table(rows: list[dict[str, Any]], as_json: bool, *, empty: str) -> None:
    """Print rows as aligned columns or as JSON; `empty` is the note when there are none."""
    if as_json:
        show_json(rows)
    elif not rows:
        say(empty)
    else:
        cells = [{key: printable(str(value or "-")) for key, value in row.items()} for row in rows]
        widths = {key: max(len(key), *(len(row[key]) for row in cells)) for key in rows[0]}
        show("  ".join(f"{key.upper():<{width}}" for key, width in widths.items()).rstrip())
        for row in cells:
            show("  ".join(f"{row[key]:<{width}}" for key, width in widths.items()).rstrip())


def base_with(ref: BaseRef, named: str | None) -> StoredBase:
    """Return the base called `named`, else the one on this machine with the fingerprint of `ref`."""
    from adapterhub.adapter import BaseName
    from adapterhub.bases.store import find_base, list_bases, pull_base

    if named is not None:
        return pull_base(BaseName.parse(named), report=say)
    for _, stored in list_bases():
        if stored.ref.fingerprint == ref.fingerprint:
            return stored
    return find_base(BaseName.parse(ref.id))


def replay_probe(adapter: Adapter, base_name: str | None) -> None:
    """Replay the recorded prompts on the base with the adapter, and record that they passed. Raises ProbeMismatch."""
    from adapterhub.bases.loading import load_base
    from adapterhub.compatibility import check_base
    from adapterhub.errors import ProbeMismatch
    from adapterhub.packer import load_kwargs
    from adapterhub.probe import replay

    recorded = adapter.probe
    if recorded is None:
        raise ProbeMismatch(f"{adapter.manifest.name} has no probe: pack it again to record one.")
    base = base_with(adapter.base, base_name)
    check_base(adapter, base)
    held = load_kwargs(adapter.manifest.base.quantization) | {"dtype": recorded.dtype}
    replay(load_base(base, purpose="serve", **held), adapter)
    say(f"probe: {len(recorded.answers)} recorded prompts answered as before ({recorded.dtype})")
    registry().record_probe(adapter)
