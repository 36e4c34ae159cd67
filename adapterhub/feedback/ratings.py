"""Ratings of systems from pairwise verdicts: Elo over random orderings, and Bradley-Terry. Knows no engine.

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

Method = Literal["bt", "elo"]
Outcome = Literal["a", "b", "tie"]
Floats = npt.NDArray[np.float64]

_SCALE = 400 / np.log(10)
"""rating points of one unit of log-odds"""
_Z = 1.959964
"""standard deviations of a 95 % interval"""
_CHUNK = 1000
"""orderings played at once: what fits the processor's caches"""
_MAX_FAULTS = 5
VERDICTS: dict[str, Outcome] = {"a": "a", "b": "b", "tie": "tie"}
FIELDS = {"model_a": "model_a", "model_b": "model_b", "winner": "winner"}


@dataclass(frozen=True)
class Verdict:
    model_a: str
    model_b: str
    winner: Outcome


@dataclass(frozen=True)
class Rating:
    """In rating points; `low` and `high` bound 95 %."""

    model: str
    rating: float
    low: float
    high: float
    games: int


@dataclass(frozen=True)
class HeadToHead:
    """What `a` did against `b`."""

    a: str
    b: str
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Ratings:
    """Best first. `notes` say what a reader must know before comparing."""

    method: Method
    ratings: tuple[Rating, ...]
    head_to_head: tuple[HeadToHead, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerdictFile:
    """What files of verdicts held."""

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _Reading:
    """What reading has found so far."""

    verdicts: list[Verdict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unparsed: Counter[str] = field(default_factory=Counter)
    idle: set[str] = field(default_factory=set)
    """systems of rows that were dropped"""
    ids: set[str] = field(default_factory=set)
    num_repeated: int = 0


def read_verdicts(
    paths: Sequence[Path], *, fields: Mapping[str, str] = FIELDS, verdicts: Mapping[str, Outcome] = VERDICTS
) -> VerdictFile:
    """JSONL rows with two models and a winner, under other names and codes where `fields` and `verdicts` say so.

    Rows whose verdict is no known code are counted and dropped, and so are later rows with an `id` seen before. Raises
    DatasetError with file and line of each row that is no verdict at all.
    """
    found = _Reading()
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path} cannot be read ({error}): expected a UTF-8 JSONL file of verdicts.") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _read_row(line, f"{path.name}:{number}", {**FIELDS, **fields}, verdicts, found)
    if found.faults:
        more = len(found.faults) - _MAX_FAULTS
        listed = "; ".join(found.faults[:_MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")
        raise DatasetError(f"these rows are no verdicts: {listed}. Correct them, or leave them out.")
    if not found.verdicts:
        dropped = f" ({sum(found.unparsed.values())} rows had none of {', '.join(verdicts)})" if found.unparsed else ""
        raise DatasetError(f"no verdict was found{dropped}: expected rows with model_a, model_b and winner.")
    return VerdictFile(tuple(found.verdicts), tuple(_reading_notes(found)))


def _read_row(
    line: str, where: str, fields: Mapping[str, str], verdicts: Mapping[str, Outcome], found: _Reading
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
        if str(name) in found.ids:
            found.num_repeated += 1
            return
        found.ids.add(str(name))
    code = str(row[fields["winner"]])
    if code not in verdicts:
        found.unparsed[code] += 1
        found.idle.update(map(str, names))
        return
    found.verdicts.append(Verdict(str(names[0]), str(names[1]), verdicts[code]))


def _reading_notes(found: _Reading) -> Iterable[str]:
    if found.unparsed:
        listed = ", ".join(f"{code!r} {count}" for code, count in found.unparsed.most_common(5))
        yield f"{sum(found.unparsed.values())} rows were dropped: their verdict is no known code ({listed})"
    if found.num_repeated:
        yield f"{found.num_repeated} rows were dropped: they repeat the id of an earlier one"
    playing = {name for verdict in found.verdicts for name in (verdict.model_a, verdict.model_b)}
    if idle := sorted(found.idle - playing):
        yield f"not rated, for no verdict on it was kept: {', '.join(idle)}"


def rate(
    verdicts: Sequence[Verdict], method: Method = "bt", *, k: float = 32, start: float = 1000, orderings: int = 10_000,
    seed: int = 0,
) -> Ratings:  # fmt: skip
    """Ratings around `start`. `k`, `orderings` and `seed` are Elo's. Raises UsageError for impossible options."""
    if not verdicts:
        return Ratings(method, (), ())
    if orderings < 1 or not 0 < k < np.inf:
        raise UsageError(f"orderings {orderings} and k {k:g} must be above 0.")
    names = sorted({name for verdict in verdicts for name in (verdict.model_a, verdict.model_b)})
    places = {name: place for place, name in enumerate(names)}
    a = np.array([places[verdict.model_a] for verdict in verdicts])
    b = np.array([places[verdict.model_b] for verdict in verdicts])
    score = np.array([{"a": 1.0, "b": 0.0, "tie": 0.5}[verdict.winner] for verdict in verdicts])
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
                    "rating: shown is the one that two drawn games against each opponent would give"
                )
    games = np.bincount(np.concatenate([a, b]), minlength=len(names))
    rated = [
        Rating(name, float(middle[i]), float(low[i]), float(high[i]), int(games[i])) for i, name in enumerate(names)
    ]
    rated.sort(key=lambda one: (-one.rating, one.model))
    return Ratings(method, tuple(rated), tuple(_head_to_head(verdicts)), tuple(notes))


def _elo(
    a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], score: Floats, count: int, *, k: float, start: float,
    orderings: int, seed: int,
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """Mean, 2.5 % and 97.5 % of each system's final rating over random orderings, played many at once."""
    dice = np.random.default_rng(seed)
    final = np.empty((orderings, count))
    for first in range(0, orderings, _CHUNK):
        chunk = min(_CHUNK, orderings - first)
        order = dice.permuted(np.tile(np.arange(len(a), dtype=np.int32), (chunk, 1)), axis=1).T
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
    """Ratings around 0 with 95 % intervals, of systems that are all compared somehow; were they finite?

    The likelihood has a finite maximum only when each system can be reached from each by wins (Ford 1957); else a drawn
    pair of games is added wherever two met. Intervals are Wald's, from the inverse of the information matrix.
    """
    count = len(wins)
    is_bounded = len(_groups(wins > 0, is_directed=True)) == 1
    if not is_bounded:
        wins = wins + ((wins + wins.T) > 0)
    played = wins + wins.T
    strength = np.zeros(count)
    for _ in range(100):
        chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
        weight = played * chance * (1 - chance)
        information = np.diag(weight.sum(axis=1)) - weight
        gradient = wins.sum(axis=1) - (played * chance).sum(axis=1)
        # The information is singular along a common shift, which changes nothing.
        step = np.linalg.pinv(information, hermitian=True) @ gradient
        strength += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    strength -= strength.mean()
    deviation = np.sqrt(np.diag(np.linalg.pinv(information, hermitian=True)).clip(0))
    rating, half = strength * _SCALE, _Z * deviation * _SCALE
    return (rating, rating - half, rating + half), is_bounded


def _groups(reaches: npt.NDArray[np.bool_], *, is_directed: bool = False) -> list[list[int]]:
    """Sets of systems that all reach one another."""
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
        yield f"no verdict connects these groups, and ratings compare only within each: {listed}"


def _head_to_head(verdicts: Sequence[Verdict]) -> Iterable[HeadToHead]:
    counts: dict[tuple[str, str], Counter[str]] = {}
    for verdict in verdicts:
        pair = (verdict.model_a, verdict.model_b)
        a, b = sorted(pair)
        winner = verdict.winner if pair == (a, b) else {"a": "b", "b": "a", "tie": "tie"}[verdict.winner]
        counts.setdefault((a, b), Counter())[winner] += 1
    for (a, b), count in sorted(counts.items()):
        yield HeadToHead(a, b, count["a"], count["b"], count["tie"])


def described(ratings: Ratings) -> dict[str, Any]:
    """As JSON, for the command and the API alike."""
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
