"""Ratings: computed by hand, invariances, and known strengths."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from adapterhub.cli.main import app
from adapterhub.errors import AdapterHubError, DatasetError, UsageError
from adapterhub.feedback.ratings import PairwiseVote, Ratings, rate, read_votes


def by_name(found: Ratings) -> dict[str, float]:
    return {one.model: one.rating for one in found.ratings}


def played(strengths: dict[str, float], games: int, seed: int = 0, ties: float = 0.0) -> list[PairwiseVote]:
    """Games between random pairs, won as the strengths (rating points) say."""
    dice = np.random.default_rng(seed)
    names = list(strengths)
    votes = []
    for _ in range(games):
        a, b = (names[place] for place in dice.choice(len(names), 2, replace=False))
        chance = 1 / (1 + 10 ** ((strengths[b] - strengths[a]) / 400))
        winner = "tie" if dice.random() < ties else "a" if dice.random() < chance else "b"
        votes.append(PairwiseVote(a, b, winner))  # type: ignore[arg-type]
    return votes


KNOWN = {"ada": 1200.0, "bea": 1050.0, "cy": 1000.0, "dan": 900.0, "eve": 850.0}
GAMES = played(KNOWN, 3000, ties=0.1)


def test_one_game_of_elo_by_hand() -> None:
    """Equal ratings: the winner takes half of K."""
    found = rate([PairwiseVote("x", "y", "a")], "elo", orderings=3)
    assert by_name(found) == {"x": 1016.0, "y": 984.0}
    assert by_name(rate([PairwiseVote("x", "y", "tie")], "elo", orderings=3)) == {"x": 1000.0, "y": 1000.0}


def test_two_games_of_elo_by_hand() -> None:
    """The second win is worth K (1 - 1 / (1 + 10^(-32 / 400)))."""
    found = rate([PairwiseVote("x", "y", "a"), PairwiseVote("y", "x", "b")], "elo", orderings=4, k=32, start=1000)
    assert by_name(found)["x"] == pytest.approx(1016 + 32 * (1 - 1 / (1 + 10 ** (-32 / 400))))


def test_elo_averages_over_orderings_by_hand() -> None:
    """A win and a loss: in either order the last game weighs more; the mean over both orders is even."""
    found = rate([PairwiseVote("x", "y", "a"), PairwiseVote("x", "y", "b")], "elo", orderings=4000)
    assert by_name(found)["x"] == pytest.approx(1000, abs=0.1)
    last = 32 / (1 + 10 ** (-32 / 400)) - 16  # what the loser of the last game ends below the start
    rated = found.ratings[0]
    assert (rated.low, rated.high) == pytest.approx((1000 - last, 1000 + last))


def test_bradley_terry_of_two_models_is_the_log_odds() -> None:
    votes = [PairwiseVote("x", "y", "a")] * 30 + [PairwiseVote("y", "x", "a")] * 10
    found = by_name(rate(votes))
    assert found["x"] - found["y"] == pytest.approx(400 * np.log10(3))
    assert found["x"] + found["y"] == pytest.approx(2000)


def test_the_interval_of_two_models_by_hand() -> None:
    """n games won with chance p: the difference has variance 1 / (n p q), each rating a quarter of it."""
    votes = [PairwiseVote("x", "y", "a")] * 30 + [PairwiseVote("x", "y", "b")] * 10
    one = rate(votes).ratings[0]
    deviation = np.sqrt(1 / (40 * 0.75 * 0.25)) / 2 * 400 / np.log(10)
    assert one.high - one.rating == pytest.approx(1.959964 * deviation)
    assert one.games == 40


def _wide(wins: int, losses: int) -> float:
    """Half-width of each of two models' intervals: the difference has variance 1 / wins + 1 / losses."""
    return float(1.959964 * np.sqrt(1 / wins + 1 / losses) / 2 * 400 / np.log(10))


def test_intervals_of_two_models_at_every_count() -> None:
    """Won k to 1, and unbeaten, where two draws are added: hundreds of points wide, never 0 and never huge."""
    for wins in range(1, 1201):
        for losses, added in ((1, 0), (0, 1)):
            votes = [PairwiseVote("x", "y", "a")] * wins + [PairwiseVote("x", "y", "b")] * losses
            one = next(one for one in rate(votes).ratings if one.model == "x")
            expected = 200 * np.log10((wins + added) / (losses + added))
            assert one.rating - 1000 == pytest.approx(expected, abs=1e-6), (wins, losses)
            assert one.high - one.rating == pytest.approx(_wide(wins + added, losses + added)), (wins, losses)


def _lopsided(seed: int) -> list[PairwiseVote]:
    """Three to six models, up to 4,000 rating points apart, and up to 3,000 games of a pair."""
    dice = np.random.default_rng(seed)
    strengths = dice.normal(0, 800, dice.integers(3, 7))
    votes = []
    for b in range(1, len(strengths)):
        for a in range(b):
            chance = 1 / (1 + 10 ** ((strengths[b] - strengths[a]) / 400))
            games = int(10 ** dice.uniform(0, 3.5))
            won = int(dice.binomial(games, chance))
            votes += [PairwiseVote(str(a), str(b), "a")] * won + [PairwiseVote(str(a), str(b), "b")] * (games - won)
    return votes


def test_lopsided_tournaments_agree_with_exact_arithmetic() -> None:
    """The covariance by the cofactors of the information matrix in rational numbers, which cannot cancel."""
    for seed in range(60):
        votes = _lopsided(seed)
        found = rate(votes)
        models = [one.model for one in found.ratings]
        games = Counter(frozenset((vote.model_a, vote.model_b)) for vote in votes)
        is_one_sided = any("only won or only lost" in note for note in found.notes)
        strengths = [Fraction(float(np.exp((one.rating - 1000) * np.log(10) / 400))) for one in found.ratings]
        information = [[Fraction(0)] * len(models) for _ in models]
        for i, j in permutations(range(len(models)), 2):
            count = games[frozenset((models[i], models[j]))]
            played = count + 2 * (is_one_sided and count > 0)
            weight = played * strengths[i] * strengths[j] / (strengths[i] + strengths[j]) ** 2
            information[i][i] += weight
            information[i][j] -= weight
        for one, variance in zip(found.ratings, _variances(information), strict=True):
            half = 1.959964 * float(variance) ** 0.5 * 400 / np.log(10)
            assert one.high - one.rating == pytest.approx(half, rel=1e-6), (seed, one.model)


def _variances(information: list[list[Fraction]]) -> list[Fraction]:
    """Return the diagonal of the inverse on vectors that sum to 0: invert without the last model, then center."""
    size = len(information)
    rows = [
        [*row[: size - 1], *(Fraction(int(place == other)) for other in range(size - 1))]
        for place, row in enumerate(information[: size - 1])
    ]
    for place in range(size - 1):
        rows[place] = [value / rows[place][place] for value in rows[place]]
        for other in range(size - 1):
            if other != place:
                factor = rows[other][place]
                rows[other] = [mine - factor * value for mine, value in zip(rows[other], rows[place], strict=True)]
    inverse = [[*row[size - 1 :], Fraction(0)] for row in rows] + [[Fraction(0)] * size]
    mean = [sum(row) / size for row in inverse]
    return [inverse[i][i] - 2 * mean[i] + sum(mean) / size for i in range(size)]


@pytest.mark.parametrize("games", [5, 20, 72, 300])
def test_the_interval_of_an_unbeaten_model_covers_chances_that_make_it_so(games: int) -> None:
    """A chance below the lower end hardly wins all; one at the upper end often does, and the note says so."""
    found = rate([PairwiseVote("x", "y", "a")] * games)
    ends = np.array([found.ratings[0].low, found.ratings[0].high])
    chances = 1 / (1 + 10 ** (-2 * (ends - 1000) / 400))
    assert chances[0] ** games < 0.05
    assert chances[1] ** games > 0.5
    assert "may be farther from the others than its interval" in found.notes[0]


@pytest.mark.parametrize("method", ["bt", "elo"])
def test_names_do_not_matter(method: str) -> None:
    renamed = {"ada": "z", "bea": "y", "cy": "x", "dan": "w", "eve": "v"}
    other = [PairwiseVote(renamed[one.model_a], renamed[one.model_b], one.winner) for one in GAMES[:300]]
    found, again = (by_name(rate(games, method, orderings=50)) for games in (GAMES[:300], other))  # type: ignore[arg-type]
    for name, rating in found.items():
        assert again[renamed[name]] == pytest.approx(rating, abs=1e-6)


@pytest.mark.parametrize("method", ["bt", "elo"])
def test_sides_do_not_matter(method: str) -> None:
    flipped = {"a": "b", "b": "a", "tie": "tie"}
    turned = [PairwiseVote(one.model_b, one.model_a, flipped[one.winner]) for one in GAMES[:300]]  # type: ignore[arg-type]
    found, again = (by_name(rate(games, method, orderings=50)) for games in (GAMES[:300], turned))  # type: ignore[arg-type]
    assert found == pytest.approx(again)


@pytest.mark.parametrize("method", ["bt", "elo"])
def test_the_start_only_shifts(method: str) -> None:
    found, again = (by_name(rate(GAMES[:300], method, orderings=50, start=s)) for s in (1000, 0))  # type: ignore[arg-type]
    assert {name: rating - 1000 for name, rating in found.items()} == pytest.approx(again)


def test_known_strengths_lie_in_their_intervals() -> None:
    """95 % each: of 20 tournaments of 5, no more than a handful may miss."""
    missed = 0
    middle = np.mean(list(KNOWN.values()))
    for seed in range(20):
        for one in rate(played(KNOWN, 600, seed)).ratings:
            missed += not one.low <= 1000 + KNOWN[one.model] - middle <= one.high
    assert missed <= 12
    assert [one.model for one in rate(GAMES).ratings] == list(KNOWN)
    assert [one.model for one in rate(GAMES, "elo", orderings=200).ratings] == list(KNOWN)


def test_more_orderings_than_are_played_at_once() -> None:
    one = rate(GAMES[:200], "elo", orderings=2500).ratings[0]
    assert one.low < one.rating < one.high
    assert one.rating == pytest.approx(rate(GAMES[:200], "elo", orderings=2500, seed=1).ratings[0].rating, abs=3)


def test_groups_without_votes_between_them_are_noted_and_rated_apart() -> None:
    found = rate([PairwiseVote("a1", "a2", "a"), PairwiseVote("a1", "a2", "b"), PairwiseVote("b1", "b2", "tie")])
    assert any("a1, a2; b1, b2" in note for note in found.notes)
    assert by_name(found) == pytest.approx(dict.fromkeys(("a1", "a2", "b1", "b2"), 1000.0))


def test_a_one_sided_tournament_has_finite_ratings_and_a_note() -> None:
    found = rate([PairwiseVote("x", "y", "a")] * 9 + [PairwiseVote("y", "z", "a"), PairwiseVote("y", "z", "b")])
    assert any("only won or only lost" in note for note in found.notes)
    assert all(np.isfinite([one.low, one.high]).all() for one in found.ratings)
    assert found.ratings[0].model == "x"


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def row(a: str, b: str, winner: str, **more: object) -> dict[str, object]:
    return {"model_a": a, "model_b": b, "winner": winner, **more}


def test_other_names_and_codes(tmp_path: Path) -> None:
    file = write(tmp_path / "v", {"x": "p", "y": "q", "verdict": "A"}, {"x": "p", "y": "q", "verdict": "?"})
    read = read_votes([file], fields={"model_a": "x", "model_b": "y", "winner": "verdict"}, codes={"A": "a", "B": "b"})
    assert read.votes == (PairwiseVote("p", "q", "a"),)
    assert any("1 rows were dropped" in note and "'?' 1" in note for note in read.notes)


def test_repeated_ids_and_models_without_a_vote_are_noted(tmp_path: Path) -> None:
    rows = [row("p", "q", "a", id=1), row("p", "q", "b", id=1), row("p", "lost", "error")]
    read = read_votes([write(tmp_path / "v", *rows)])
    assert len(read.votes) == 1
    assert any("1 rows were dropped because they repeat the id" in note for note in read.notes)
    assert any(note.endswith(": lost") for note in read.notes)


def test_a_question_s_id_that_many_pairs_share_is_no_repetition(tmp_path: Path) -> None:
    rows = [row("p", "q", "a", id=1), row("q", "p", "a", id=1), row("p", "r", "a", id=1), row("q", "r", "b", id="1")]
    read = read_votes([write(tmp_path / "v", *rows)])
    assert [(one.model_a, one.model_b) for one in read.votes] == [("p", "q"), ("p", "r"), ("q", "r")]


def test_rows_that_are_not_votes_are_named_by_line(tmp_path: Path) -> None:
    file = write(tmp_path / "v.jsonl", row("p", "q", "a"), "{", row("p", "p", "a"), {"model_a": "p"}, "[1]")
    with pytest.raises(DatasetError) as caught:
        read_votes([file])
    for where in ("v.jsonl:2", "v.jsonl:3", "v.jsonl:4", "v.jsonl:5"):
        assert where in str(caught.value)


def test_files_without_votes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no votes found"):
        read_votes([write(tmp_path / "v", row("p", "q", "maybe"))])


def test_the_command(tmp_path: Path) -> None:
    file = write(tmp_path / "v", *(row(one.model_a, one.model_b, one.winner) for one in GAMES[:200]))
    outcome = CliRunner().invoke(app, ["ratings", str(file), "--json", "--plot", str(tmp_path / "r.png")])
    assert outcome.exit_code == 0, outcome.output
    said = json.loads(outcome.stdout)
    assert [set(one) for one in said["ratings"]] == [{"model", "rating", "low", "high", "games"}] * 5
    assert said["ratings"][0]["model"] == "ada"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(app, ["ratings", str(file), "--method", "elo", "--orderings", "20"]).stdout
    assert "ada" in shown
    assert "WINS" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fields", "winner"], "not NAME=VALUE"),
        (["--fields", "who=x"], "expected model_a"),
        (["--winner-codes", "A=left"], "--winner-codes A=left: expected a, b or tie"),
        (["--verdicts", "A=left"], "--verdicts A=left: expected a, b or tie"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: list[str], said: str) -> None:
    file = write(tmp_path / "v", row("p", "q", "a"))
    outcome = CliRunner().invoke(app, ["ratings", str(file), *options])
    assert isinstance(outcome.exception, AdapterHubError)
    assert isinstance(outcome.exception, UsageError)
    assert said in str(outcome.exception)


def test_the_old_name_of_the_winner_codes_is_accepted(tmp_path: Path) -> None:
    file = write(tmp_path / "v", row("p", "q", "L"), row("p", "q", "R"))
    new, old = (
        CliRunner().invoke(app, ["ratings", str(file), "--json", option, "L=a,R=b"])
        for option in ("--winner-codes", "--verdicts")
    )
    assert json.loads(new.stdout)["head_to_head"] == [{"a": "p", "b": "q", "wins": 1, "losses": 1, "ties": 0}]
    assert new.stdout == old.stdout


@pytest.mark.parametrize("k", ["0", "nan", "inf"])
def test_a_game_moves_ratings_by_a_finite_number_above_0(tmp_path: Path, k: str) -> None:
    file = write(tmp_path / "v", row("p", "q", "a"))
    outcome = CliRunner().invoke(app, ["ratings", str(file), "--method", "elo", "--k", k])
    assert outcome.exit_code == 2
    assert "is not a finite number above 0" in outcome.output


def test_a_text_with_a_line_end_of_its_own_is_one_row(tmp_path: Path) -> None:
    file = tmp_path / "v.jsonl"
    file.write_text(json.dumps(row("p", "q", "a", text="x\u2028y\u0085z"), ensure_ascii=False), encoding="utf-8")
    assert read_votes([file]).votes == (PairwiseVote("p", "q", "a"),)
