"""Verbs of feedback: what servers on this machine collected, as files for trainers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import AsJson, say, table

if TYPE_CHECKING:
    from adapterhub.feedback.store import FeedbackStore

feedback = typer.Typer(
    help="Votes, thumbs and corrections that servers on this machine collected.", no_args_is_help=True
)
app.add_typer(feedback, name="feedback")


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
    Path | None, typer.Option("--store", metavar="FILE", help="[default: $ADAPTERHUB_HOME/feedback.sqlite]")
]


@feedback.command()
def export(
    form: Annotated[
        _Format,
        typer.Option(
            "--format",
            parser=_parse_format,
            metavar="dpo|kto|sft|votes",
            help="dpo, kto or sft for `train` and TRL; votes for `ratings`.",
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSONL file [default: stdout].")] = None,
    store: Store = None,
) -> None:
    """Write feedback as training data."""
    from adapterhub.feedback.export import export_rows, to_jsonl
    from adapterhub.files import write_atomic

    lines = export_rows((given for _, given in open_store(store).rows()), form.value)
    if output is None:
        typer.echo(to_jsonl(lines), nl=False)
    else:
        write_atomic(output, to_jsonl(lines))
        say(f"{len(lines)} lines written to {output}")


@feedback.command()
def stats(store: Store = None, as_json: AsJson = False) -> None:
    """Count what there is."""
    rows = [{"kind": kind, "count": str(count)} for kind, count in open_store(store).counts().items()]
    table(rows, as_json, empty="no feedback yet")


def open_store(path: Path | None) -> FeedbackStore:
    """Raises UsageError when no server on this machine has kept any."""
    from adapterhub.errors import UsageError
    from adapterhub.feedback.store import STORE_NAME, FeedbackStore
    from adapterhub.paths import home

    found = path or home() / STORE_NAME
    if not found.is_file():
        raise UsageError(f"{found} is not there: serve, and let people vote, or name another --store.")
    return FeedbackStore(found)
