"""What people said of answers: votes, thumbs and corrections, appended to one SQLite file; and what they teach.

A row is on disk when `add` returns (write-ahead log, synchronised at each commit). Rows belong to the key that sent
them, of which only a digest is kept, and are deleted for good when that key asks.
"""

from __future__ import annotations

import errno
import hashlib
import random
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from adapterhub.errors import Conflict, ServeError, ServerBusy, UsageError
from adapterhub.feedback.ratings import Outcome, Verdict, rate
from adapterhub.files import raise_storage_full

STORE_NAME = "feedback.sqlite"
"""in the folder of user data"""
ExportFormat = Literal["dpo", "kto", "sft", "verdicts"]
_MAX_CHARACTERS = 200_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS battles (id TEXT PRIMARY KEY, a TEXT, b TEXT);
CREATE TABLE IF NOT EXISTS feedback (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, created INTEGER, owner TEXT, kind TEXT, battle TEXT UNIQUE, body TEXT
);
"""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(_Closed):
    role: str = Field(max_length=40)
    content: str = Field(max_length=_MAX_CHARACTERS)


class AnswerGiven(_Closed):
    model: str = Field(min_length=1, max_length=500)
    digest: str | None = Field(None, max_length=500)
    text: str = Field(max_length=_MAX_CHARACTERS)


class _About(_Closed):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    """what was asked, without the answer"""


class Vote(_About):
    kind: Literal["vote"]
    battle: str = Field(max_length=100)
    a: AnswerGiven
    b: AnswerGiven
    winner: Literal["a", "b", "tie", "both_bad"]


class Thumb(_About):
    kind: Literal["thumb"]
    answer: AnswerGiven
    thumb: Literal["up", "down"]


class Correction(_About):
    kind: Literal["correction"]
    answer: AnswerGiven
    text: str = Field(min_length=1, max_length=_MAX_CHARACTERS)
    """what the answer should have been"""


Feedback = Annotated[Vote | Thumb | Correction, Field(discriminator="kind")]
_FEEDBACK: TypeAdapter[Vote | Thumb | Correction] = TypeAdapter(Feedback)


@dataclass(frozen=True)
class Kept:
    """A row, as its sender sees it again."""

    id: str
    kind: str
    created: int


@dataclass(frozen=True)
class Battle:
    id: str
    a: str
    b: str


class FeedbackStore:
    """One file, any number of processes. Every method opens it anew: there is nothing to lose when one is killed.

    Every method raises StorageFull, ServerBusy while others write for half a minute, and ServeError for a file that
    cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, given: Vote | Thumb | Correction, *, owner: str) -> Kept:
        """Raises Conflict for a second vote on a battle, UsageError for a vote that fits no battle."""
        kept = Kept(f"fb-{secrets.token_hex(8)}", given.kind, int(time.time()))
        with self._open() as db:
            battle = given.battle if isinstance(given, Vote) else None
            if isinstance(given, Vote):
                self._check_battle(db, given)
            try:
                db.execute(
                    "INSERT INTO feedback (id, created, owner, kind, battle, body) VALUES (?, ?, ?, ?, ?, ?)",
                    (kept.id, kept.created, owner, kept.kind, battle, given.model_dump_json()),
                )
            except sqlite3.IntegrityError:
                raise Conflict(f"there is a vote on battle {battle} already: it stays, a vote counts once.") from None
        return kept

    def begin_battle(self, models: Sequence[str]) -> Battle:
        """A pair to judge, drawn where a vote teaches most, on random sides. Raises UsageError for fewer than two."""
        if len(set(models)) < 2:
            raise UsageError(f"a battle needs two models, there are {len(set(models))}: load another adapter.")
        pair = list(_draw(sorted(set(models)), self.verdicts()))
        random.shuffle(pair)
        battle = Battle(f"bt-{secrets.token_hex(8)}", *pair)
        with self._open() as db:
            db.execute("INSERT INTO battles (id, a, b) VALUES (?, ?, ?)", (battle.id, battle.a, battle.b))
        return battle

    def of(self, owner: str | None = None) -> list[tuple[Kept, Vote | Thumb | Correction]]:
        """Rows in the order they came; with `owner`, that key's alone."""
        where, given = ("", ()) if owner is None else (" WHERE owner = ?", (owner,))
        with self._open() as db:
            rows = db.execute(f"SELECT id, kind, created, body FROM feedback{where} ORDER BY number", given).fetchall()  # noqa: S608
        return [(Kept(row[0], row[1], row[2]), _FEEDBACK.validate_json(row[3])) for row in rows]

    def delete(self, owner: str, name: str | None = None) -> int:
        """Forget one row of a key's, or all; returns how many there were."""
        one, given = ("", (owner,)) if name is None else (" AND id = ?", (owner, name))
        with self._open() as db:
            db.execute("PRAGMA secure_delete = ON")
            return db.execute(f"DELETE FROM feedback WHERE owner = ?{one}", given).rowcount  # noqa: S608

    def counts(self) -> dict[str, int]:
        with self._open() as db:
            return dict(db.execute("SELECT kind, COUNT(*) FROM feedback GROUP BY kind ORDER BY kind"))

    def verdicts(self) -> list[Verdict]:
        """Votes as ratings take them; two bad answers are a tie."""
        with self._open() as db:
            rows = db.execute("SELECT body FROM feedback WHERE kind = 'vote' ORDER BY number").fetchall()
        votes = (Vote.model_validate_json(body) for (body,) in rows)
        return [Verdict(one.a.model, one.b.model, outcome_of(one)) for one in votes]

    def _check_battle(self, db: sqlite3.Connection, vote: Vote) -> None:
        found = db.execute("SELECT a, b FROM battles WHERE id = ?", (vote.battle,)).fetchone()
        if found is None:
            raise UsageError(f"there is no battle {vote.battle!r}: POST /v1/arena/battles begins one.")
        if (vote.a.model, vote.b.model) != tuple(found):
            raise UsageError(
                f"battle {vote.battle} is between {found[0]} and {found[1]}, the vote between {vote.a.model} and "
                f"{vote.b.model}."
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with raise_storage_full(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with closing(sqlite3.connect(self.path, timeout=30)) as db:
                    db.execute("PRAGMA journal_mode = WAL")
                    db.execute("PRAGMA synchronous = FULL")
                    db.executescript(_SCHEMA)
                    with db:
                        _forget_owners_of_battles(db)
                        yield db
            except sqlite3.Error as error:
                raise _ours(error, self.path) from error


def _forget_owners_of_battles(db: sqlite3.Connection) -> None:
    """An earlier version wrote down who began a battle, which nobody could have deleted."""
    if db.execute("SELECT 1 FROM pragma_table_info('battles') WHERE name = 'owner'").fetchone() is None:
        return
    if db.execute("SELECT 1 FROM battles WHERE owner IS NOT NULL LIMIT 1").fetchone() is not None:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("UPDATE battles SET owner = NULL WHERE owner IS NOT NULL")


def _ours(error: sqlite3.Error, path: Path) -> Exception:
    """What SQLite met, as ours; a full disk as the system's own error, for raise_storage_full."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return OSError(errno.ENOSPC, str(error))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return ServerBusy(f"{path} is being written by others: try again.")
    return ServeError(
        f"the feedback in {path} cannot be read or written ({error}): see to the file's rights, or move it away to "
        "begin a new one."
    )


def owner_of(authorization: str | None) -> str:
    """What is kept of a key: enough to know it again, too little to use it."""
    key = (authorization or "").partition(" ")[2].strip()
    return hashlib.sha256(b"adapterhub feedback\0" + key.encode()).hexdigest()[:32]


def actor_of(authorization: str | None) -> str | None:
    """Who a history says it was: as much of a key as tells it from others. None: this process."""
    return f"key {owner_of(authorization)[:8]}" if authorization else None


def outcome_of(vote: Vote) -> Outcome:
    return "tie" if vote.winner == "both_bad" else vote.winner


def _draw(models: Sequence[str], verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """A pair, likelier the closer its ratings and the fewer its games: p (1 - p) / (1 + n) is what a game tells."""
    names = set(models)
    relevant = [verdict for verdict in verdicts if {verdict.model_a, verdict.model_b} <= names]
    rated = {one.model: one.rating for one in rate(relevant).ratings}
    games: dict[frozenset[str], int] = {}
    for verdict in relevant:
        pair = frozenset((verdict.model_a, verdict.model_b))
        games[pair] = games.get(pair, 0) + 1
    pairs = list(combinations(models, 2))

    def worth(a: str, b: str) -> float:
        chance = 1 / (1 + 10 ** ((rated.get(b, 1000.0) - rated.get(a, 1000.0)) / 400))
        return chance * (1 - chance) / (1 + games.get(frozenset((a, b)), 0))

    return random.choices(pairs, [worth(a, b) for a, b in pairs])[0]  # noqa: S311 (no secret)
