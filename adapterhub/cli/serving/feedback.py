"""Commands on the feedback that servers on this machine collected: `feedback export` and `feedback stats`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.options import AsJson, say, table

if TYPE_CHECKING:
    from adapterhub.feedback.store import FeedbackStore


class _Format(StrEnum):
    dpo = "dpo"
    kto = "kto"
    sft = "sft"
    votes = "votes"


def _parse_format(text: str) -> _Format:
    """Return the format; `verdicts` is the old name of `votes`."""
    try:
        return _Format("votes" if text == "verdicts" else text)
    except ValueError:
        raise typer.BadParameter(f"unknown format {text!r}: expected {', '.join(_Format)}.") from None


Store = Annotated[
    Path | None,
    typer.Option("--store", metavar="FILE", help="Feedback database [default: $ADAPTERHUB_HOME/feedback.sqlite]."),
]


def export(
    form: Annotated[
        _Format,
        typer.Option(
            "--format",
            parser=_parse_format,
            metavar="dpo|kto|sft|votes",
            help="Format of the lines: dpo, kto and sft are for `train` and TRL, votes for `ratings`.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="JSONL file to write [default: stdout].")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME|DIGEST", help="Only rows with an answer of this adapter. Repeatable."),
    ] = None,
    store: Store = None,
) -> None:
    """Write feedback as training data."""
    from adapterhub.feedback.export import export_rows, to_jsonl
    from adapterhub.files import write_atomic

    found = export_rows(open_store(store).rows(), form.value, about=adapters)
    for note in found.notes:
        say(f"note: {note}")
    if output is None:
        typer.echo(to_jsonl(found.lines), nl=False)
    else:
        write_atomic(output, to_jsonl(found.lines))
        say(f"{len(found.lines)} lines written to {output}")


def stats(store: Store = None, as_json: AsJson = False) -> None:
    """Count the feedback entries of each kind."""
    rows = [{"kind": kind, "count": str(count)} for kind, count in open_store(store).counts().items()]
    table(rows, as_json, empty="no feedback yet")


def open_store(path: Path | None) -> FeedbackStore:
    """Open the feedback database. Raises UsageError when there is none."""
    from adapterhub.errors import UsageError
    from adapterhub.feedback.store import STORE_NAME, FeedbackStore
    from adapterhub.paths import home

    found = path or home() / STORE_NAME
    if not found.is_file():
        raise UsageError(
            f"no feedback database at {found}: a server creates it with the first vote. Give another --store FILE."
        )
    return FeedbackStore(found)
