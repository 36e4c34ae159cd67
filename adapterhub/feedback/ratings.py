"""Ratings of models from pairwise votes: Bradley-Terry, and Elo averaged over random orderings.

Elo              R_a += K (S_a - 1 / (1 + 10^((R_b - R_a) / 400)))          Elo 1978; arXiv 2305.14314, section 5.1
Bradley-Terry    P(a beats b) = 1 / (1 + 10^((R_b - R_a) / 400))            Bradley & Terry 1952, fitted by Newton
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from adapterhub.errors import DatasetError, UsageError

RatingMethod = Literal["bt", "elo"]
Winner = Literal["a", "b", "tie"]
Floats = npt.NDArray[np.float64]

_SCALE = 400 / np.log(10)
"""Rating points per unit of log-odds."""
_Z = 1.959964
"""Half-width of a 95 % interval, in standard deviations."""
_CHUNK = 1000
"""Orderings computed at once: as many as fit the processor's caches."""
_MAX_ITERATIONS = 100
_MAX_FAULTS = 5
WINNER_CODES: dict[str, Winner] = {"a": "a", "b": "b", "tie": "tie"}
FIELDS = {"model_a": "model_a", "model_b": "model_b", "winner": "winner"}


@dataclass(frozen=True)
class PairwiseVote:
    """A vote between two models."""

    model_a: str
    model_b: str
    winner: Winner


@dataclass(frozen=True)
class Rating:
    """A model's rating and its 95 % interval, in rating points."""

    model: str
    rating: float
    low: float
    high: float
    games: int


@dataclass(frozen=True)
class HeadToHead:
    """The results of `a` against `b`."""

    a: str
    b: str
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Ratings:
    """All ratings, best first; `notes` list the reasons why some cannot be compared."""

    method: RatingMethod
    ratings: tuple[Rating, ...]
    head_to_head: tuple[HeadToHead, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VoteFile:
    """The votes in the files that were read, and notes about dropped rows."""

    votes: tuple[PairwiseVote, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _VoteReader:
    """The state of reading vote files."""

    votes: list[PairwiseVote] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unparsed: Counter[str] = field(default_factory=Counter)
    idle: set[str] = field(default_factory=set)
    """Models of dropped rows."""
    ids: set[tuple[str, frozenset[str]]] = field(default_factory=set)
    """Id and models of each row that has an id: in some files the id is that of a question, asked of many pairs."""
    num_repeated: int = 0


def read_votes(
    paths: Sequence[Path], *, fields: Mapping[str, str] = FIELDS, codes: Mapping[str, Winner] = WINNER_CODES
) -> VoteFile:
    """Read JSONL rows with two models and a winner.

    `fields` maps the three field names to those of the files, `codes` the files' winner codes to ours. Rows with an
    unknown winner code are counted and dropped, and so are rows that repeat `id` and models of an earlier row. Raises
    DatasetError, which names file and line of each row that is not a vote.
    """
    found = _VoteReader()
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} cannot be read ({error}): expected a UTF-8 JSONL file of votes.") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _read_row(line, f"{path.name}:{number}", {**FIELDS, **fields}, codes, found)
    if found.faults:
        more = len(found.faults) - _MAX_FAULTS
        listed = "; ".join(found.faults[:_MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")
        raise DatasetError(f"{len(found.faults)} rows are not votes: {listed}. Correct or remove them.")
    if not found.votes:
        dropped = (
            f" ({sum(found.unparsed.values())} rows had none of the winner codes {', '.join(codes)})"
            if found.unparsed
            else ""
        )
        raise DatasetError(f"no votes found{dropped}: expected rows with model_a, model_b and winner.")
    return VoteFile(tuple(found.votes), tuple(_reading_notes(found)))


def _read_row(
    line: str, where: str, fields: Mapping[str, str], codes: Mapping[str, Winner], found: _VoteReader
) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        found.faults.append(f"{where}: not JSON ({error})")
        return
    names = [row.get(fields[key]) for key in ("model_a", "model_b")] if isinstance(row, dict) else [None]
    if not all(isinstance(name, str) and name for name in names) or fields["winner"] not in row:
        missing = ", ".join(fields.values())
        found.faults.append(f"{where}: expected an object with {missing}")
        return
    if names[0] == names[1]:
        found.faults.append(f"{where}: {names[0]} is compared with itself")
        return
    if (name := row.get("id")) is not None:
        if (identity := (str(name), frozenset(map(str, names)))) in found.ids:
            found.num_repeated += 1
            return
        found.ids.add(identity)
    code = str(row[fields["winner"]])
    if code not in codes:
        found.unparsed[code] += 1
        found.idle.update(map(str, names))
        return
    found.votes.append(PairwiseVote(str(names[0]), str(names[1]), codes[code]))


def _reading_notes(found: _VoteReader) -> Iterable[str]:
    if found.unparsed:
        listed = ", ".join(f"{code!r} {count}" for code, count in found.unparsed.most_common(5))
        yield f"{sum(found.unparsed.values())} rows were dropped because of an unknown winner code ({listed})"
    if found.num_repeated:
        yield f"{found.num_repeated} rows were dropped because they repeat the id and the models of an earlier row"
    playing = {name for vote in found.votes for name in (vote.model_a, vote.model_b)}
    if idle := sorted(found.idle - playing):
        yield f"not rated, because all their votes were dropped: {', '.join(idle)}"


def rate(
    votes: Sequence[PairwiseVote], method: RatingMethod = "bt", *, k: float = 32, start: float = 1000,
    orderings: int = 10_000, seed: int = 0,
) -> Ratings:  # fmt: skip
    """Compute ratings with mean `start`; `k`, `orderings` and `seed` apply to Elo. Raises UsageError."""
    if not votes:
        return Ratings(method, (), ())
    if orderings < 1 or not 0 < k < np.inf:
        raise UsageError(f"invalid orderings {orderings} or k {k:g}: expected numbers above 0.")
    names = sorted({name for vote in votes for name in (vote.model_a, vote.model_b)})
    places = {name: place for place, name in enumerate(names)}
    a = np.array([places[vote.model_a] for vote in votes])
    b = np.array([places[vote.model_b] for vote in votes])
    score = np.array([{"a": 1.0, "b": 0.0, "tie": 0.5}[vote.winner] for vote in votes])
    wins = np.zeros((len(names), len(names)))  # wins[i, j]: points of i against j
    np.add.at(wins, (a, b), score)
    np.add.at(wins, (b, a), 1 - score)
    groups = _groups((wins + wins.T) > 0)
    notes = list(_group_notes(names, groups))
    if method == "elo":
        middle, low, high = _elo(a, b, score, len(names), k=k, start=start, orderings=orderings, seed=seed)
    else:
        middle, low, high = (np.full(len(names), float(start)) for _ in range(3))
        for group in groups:
            part, is_bounded = _bradley_terry(wins[np.ix_(group, group)])
            middle[group], low[group], high[group] = (start + values for values in part)
            if not is_bounded:
                notes.append(
                    f"among {', '.join(names[i] for i in group)} some only won or only lost, and have no finite "
                    "rating: the ratings shown include two extra draws against each opponent, and such a model may be "
                    "farther from the others than its interval"
                )
    games = np.bincount(np.concatenate([a, b]), minlength=len(names))
    rated = [
        Rating(name, float(middle[i]), float(low[i]), float(high[i]), int(games[i])) for i, name in enumerate(names)
    ]
    rated.sort(key=lambda one: (-one.rating, one.model))
    return Ratings(method, tuple(rated), tuple(_head_to_head(votes)), tuple(notes))


def _elo(
    a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], score: Floats, count: int, *, k: float, start: float,
    orderings: int, seed: int,
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """Return mean, 2.5 % and 97.5 % quantile of each model's final rating over random orderings."""
    rng = np.random.default_rng(seed)
    final = np.empty((orderings, count))
    for first in range(0, orderings, _CHUNK):
        chunk = min(_CHUNK, orderings - first)
        order = rng.permuted(np.tile(np.arange(len(a), dtype=np.int32), (chunk, 1)), axis=1).T
        ratings = np.full(chunk * count, float(start))
        rows = np.arange(chunk) * count
        for games in order:
            left, right = rows + a[games], rows + b[games]
            expected = 1 / (1 + 10 ** ((ratings[right] - ratings[left]) / 400))
            gain = k * (score[games] - expected)
            ratings[left] += gain
            ratings[right] -= gain
        final[first : first + chunk] = ratings.reshape(chunk, count)
    low, high = np.percentile(final, [2.5, 97.5], axis=0)
    return final.mean(axis=0), low, high


def _bradley_terry(wins: Floats) -> tuple[tuple[Floats, Floats, Floats], bool]:
    """Return ratings with mean 0 and 95 % intervals of a connected group, and whether the ratings are finite.

    The likelihood has a finite maximum only if each model can be reached from each other one by wins (Ford 1957); else
    two draws are added for each pair that was compared. The intervals are Wald's, from the inverse of the information
    matrix.
    """
    count = len(wins)
    is_bounded = len(_groups(wins > 0, is_directed=True)) == 1
    if not is_bounded:
        wins = wins + ((wins + wins.T) > 0)
    played = wins + wins.T
    strength = np.zeros(count)
    # The information matrix is singular along a common shift, which does not change the likelihood. With J / n added,
    # J being all ones, it has the same inverse elsewhere and an eigenvalue of 1 there: no small number is inverted.
    shift = np.full((count, count), 1 / count)
    for _ in range(_MAX_ITERATIONS):
        chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
        # chance.T is 1 - chance without its cancellation for a chance near 1.
        weight = played * chance * chance.T
        information = np.diag(weight.sum(axis=1)) - weight
        gradient = (wins * chance.T - wins.T * chance).sum(axis=1)
        step = np.linalg.solve(information + shift, gradient)
        strength += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    strength -= strength.mean()
    covariance = np.linalg.inv(information + shift) - shift
    rating, half = strength * _SCALE, _Z * np.sqrt(np.diag(covariance)) * _SCALE
    return (rating, rating - half, rating + half), is_bounded


def _groups(reaches: npt.NDArray[np.bool_], *, is_directed: bool = False) -> list[list[int]]:
    """Return the sets of models that all reach one another."""
    closure = reaches | reaches.T if not is_directed else reaches.copy()
    closure |= np.eye(len(reaches), dtype=bool)
    for through in range(len(reaches)):
        closure |= np.outer(closure[:, through], closure[through])
    both = closure & closure.T
    seen: set[int] = set()
    groups = []
    for place in range(len(reaches)):
        if place not in seen:
            group = [int(other) for other in np.flatnonzero(both[place])]
            seen.update(group)
            groups.append(group)
    return groups


def _group_notes(names: Sequence[str], groups: Sequence[Sequence[int]]) -> Iterable[str]:
    if len(groups) > 1:
        listed = "; ".join(", ".join(names[place] for place in group) for group in groups)
        yield f"no votes connect these groups, so ratings can be compared only within a group: {listed}"


def _head_to_head(votes: Sequence[PairwiseVote]) -> Iterable[HeadToHead]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for vote in votes:
        pair = (vote.model_a, vote.model_b)
        a, b = sorted(pair)
        winner = vote.winner if pair == (a, b) else {"a": "b", "b": "a", "tie": "tie"}[vote.winner]
        counts.setdefault((a, b), Counter())[winner] += 1
    for (a, b), count in sorted(counts.items()):
        yield HeadToHead(a, b, count["a"], count["b"], count["tie"])


def ratings_dict(ratings: Ratings) -> dict[str, Any]:
    """Return the ratings as JSON values, for the command line and the API."""
    return {
        "method": ratings.method,
        "ratings": [
            {"model": one.model, "rating": round(one.rating, 2), "low": round(one.low, 2), "high": round(one.high, 2),
             "games": one.games}
            for one in ratings.ratings
        ],
        "head_to_head": [vars(one) for one in ratings.head_to_head],
        "notes": list(ratings.notes),
    }  # fmt: skip
