"""The command `ratings`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.options import AsJson, check_finite, check_positive, say, show, show_json, table

if TYPE_CHECKING:
    from adapterhub.feedback.ratings import Winner


class _RatingMethod(StrEnum):
    bt = "bt"
    elo = "elo"


def _check_png(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"'{path}' is not a PNG file: expected a name that ends in .png.")
    return path


def ratings(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            exists=True,
            dir_okay=False,
            help="JSONL file of votes with the fields model_a, model_b and winner (a, b or tie).",
        ),
    ],
    method: Annotated[
        _RatingMethod, typer.Option(help="Rating model: Bradley-Terry, or Elo averaged over random orderings.")
    ] = _RatingMethod.bt,
    k: Annotated[
        float, typer.Option(callback=check_positive, help="Elo: most points that one game can move a rating by.")
    ] = 32,
    start: Annotated[float, typer.Option(callback=check_finite, help="Mean of all ratings.")] = 1000,
    orderings: Annotated[int, typer.Option(help="Elo: number of random orderings.", min=1, max=10_000_000)] = 10_000,
    seed: Annotated[int, typer.Option(help="Elo: random seed of the orderings.", min=0, max=2**63 - 1)] = 0,
    fields: Annotated[
        str | None,
        typer.Option(metavar="NAME=THEIRS,...", help="Names of the fields in the files, such as winner=verdict."),
    ] = None,
    winner_codes: Annotated[
        str | None,
        typer.Option(metavar="CODE=a|b|tie,...", help="Meaning of other winner codes, such as A=a,B=b,C=tie."),
    ] = None,
    verdicts: Annotated[str | None, typer.Option(hidden=True, help="Old name of --winner-codes.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", dir_okay=False, callback=_check_png, help="PNG file to plot the ratings to."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rate models from pairwise votes, with 95 % intervals."""
    from adapterhub.feedback.ratings import rate, ratings_dict, read_votes

    read = read_votes(files, fields=_fields(fields), codes=_codes(winner_codes, verdicts))
    found = rate(read.votes, method.value, k=k, start=start, orderings=orderings, seed=seed)
    if plot is not None:
        from adapterhub.feedback.ratings_plot import plot_ratings

        plot_ratings(found, plot)
    notes = (*read.notes, *found.notes)
    if as_json:
        show_json(ratings_dict(found) | {"notes": notes})
        return
    table(
        [
            {"model": one.model, "rating": f"{one.rating:.0f}", "low": f"{one.low:.0f}", "high": f"{one.high:.0f}",
             "games": one.games}
            for one in found.ratings
        ],
        False, empty="no votes",
    )  # fmt: skip
    show()
    table([vars(one) | {key: str(vars(one)[key]) for key in ("wins", "losses", "ties")} for one in found.head_to_head],
          False, empty="no games")  # fmt: skip
    for note in notes:
        say(f"note: {note}")


def _pairs(text: str | None, option: str) -> dict[str, str]:
    from adapterhub.errors import UsageError

    found = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not (equals and name and value):
            raise UsageError(f"{option} {part!r} is not NAME=VALUE.")
        found[name] = value
    return found


def _fields(text: str | None) -> dict[str, str]:
    from adapterhub.errors import UsageError
    from adapterhub.feedback.ratings import FIELDS

    found = _pairs(text, "--fields")
    if unexpected := sorted(set(found) - set(FIELDS)):
        raise UsageError(f"unexpected field in --fields: {', '.join(unexpected)}; expected {', '.join(FIELDS)}.")
    return found


def _codes(text: str | None, old: str | None) -> dict[str, Winner]:
    from adapterhub.errors import UsageError
    from adapterhub.feedback.ratings import WINNER_CODES

    if None not in (text, old):
        raise UsageError("--winner-codes and --verdicts are the same setting: give --winner-codes only.")
    option, given = ("--winner-codes", text) if text is not None else ("--verdicts", old)
    found: dict[str, Winner] = {}
    for code, meaning in _pairs(given, option).items():
        if meaning not in WINNER_CODES:
            raise UsageError(f"{option} {code}={meaning}: expected a, b or tie after '='.")
        found[code] = WINNER_CODES[meaning]
    return found or dict(WINNER_CODES)
