"""User feedback in one SQLite file: votes, thumbs and corrections, and the battles that votes are about.

A row is on disk when `add` returns (write-ahead log, synchronized at each commit). A row belongs to the API key that
sent it, of which only a digest is stored; that key can delete it permanently.
"""

from __future__ import annotations

import errno
import hashlib
import random
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import combinations, cycle
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from adapterhub.errors import Conflict, ServeError, ServerBusy, UsageError
from adapterhub.feedback.ratings import PairwiseVote, Winner, rate
from adapterhub.files import raise_storage_full
from adapterhub.strict import Strict

STORE_NAME = "feedback.sqlite"
"""Name of the file in the user data folder."""
ExportFormat = Literal["dpo", "kto", "sft", "votes"]
_MAX_CHARACTERS = 200_000
_SYSTEM_ROLES = ("system", "developer")
"""Names of the system message in requests for answers (serve/api/schemas.py)."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS battles (id TEXT PRIMARY KEY, a TEXT, b TEXT);
CREATE TABLE IF NOT EXISTS feedback (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, created INTEGER, owner TEXT, kind TEXT, battle TEXT UNIQUE, body TEXT
);
"""


class PromptMessage(Strict):
    """A message of the conversation before the answer."""

    role: str = Field(max_length=40)
    content: str = Field(max_length=_MAX_CHARACTERS)


class FeedbackAnswer(Strict):
    """An answer that feedback is about."""

    model: str = Field(min_length=1, max_length=500)
    digest: str | None = Field(None, max_length=500)
    text: str = Field(max_length=_MAX_CHARACTERS)


class _AboutPrompt(Strict):
    messages: list[PromptMessage] = Field(min_length=1, max_length=1000)
    """The conversation, without the answer."""


class Vote(_AboutPrompt):
    """A vote between the two answers of a battle."""

    kind: Literal["vote"]
    battle: str = Field(max_length=100)
    a: FeedbackAnswer
    b: FeedbackAnswer
    winner: Literal["a", "b", "tie", "both_bad"]


class Thumb(_AboutPrompt):
    """A thumb up or down for an answer."""

    kind: Literal["thumb"]
    answer: FeedbackAnswer
    thumb: Literal["up", "down"]


class Correction(_AboutPrompt):
    """A better text for an answer."""

    kind: Literal["correction"]
    answer: FeedbackAnswer
    text: str = Field(min_length=1, max_length=_MAX_CHARACTERS)
    """The corrected answer."""


Feedback = Annotated[Vote | Thumb | Correction, Field(discriminator="kind")]
_FEEDBACK: TypeAdapter[Vote | Thumb | Correction] = TypeAdapter(Feedback)


@dataclass(frozen=True)
class StoredFeedback:
    """The id, kind and creation time of a stored row; the time is in seconds since 1970."""

    id: str
    kind: str
    created: int


FeedbackRow = tuple[StoredFeedback, Vote | Thumb | Correction | None]
"""A stored row with its feedback; None: the row cannot be read, because another version wrote it or it is damaged."""


@dataclass(frozen=True)
class ArenaBattle:
    """Two models whose answers are to be compared."""

    id: str
    a: str
    b: str


class FeedbackStore:
    """The feedback in one file, which any number of processes can use; each method opens the file and closes it.

    Every method raises StorageFull, ServerBusy if other processes write for more than 30 s, and ServeError if the file
    cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, feedback: Vote | Thumb | Correction, *, owner: str) -> StoredFeedback:
        """Store feedback that training can use.

        Raises UsageError with the reason for feedback that it cannot use, and for a vote on an unknown battle; Conflict
        for a second vote on a battle.
        """
        if fault := fault_of(feedback):
            raise UsageError(
                f"training cannot use this feedback: {fault}. Send an optional system message, then user and assistant "
                "in turn, the user last, with text in every message and answer."
            )
        if isinstance(feedback, Correction) and has_equal_answers(feedback):
            raise UsageError("the correction is the same as the answer: expected another text. Send a thumb instead.")
        stored = StoredFeedback(f"fb-{secrets.token_hex(8)}", feedback.kind, int(time.time()))
        with self._open() as db:
            battle = feedback.battle if isinstance(feedback, Vote) else None
            if isinstance(feedback, Vote):
                self._check_battle(db, feedback)
            try:
                db.execute(
                    "INSERT INTO feedback (id, created, owner, kind, battle, body) VALUES (?, ?, ?, ?, ?, ?)",
                    (stored.id, stored.created, owner, stored.kind, battle, feedback.model_dump_json()),
                )
            except sqlite3.IntegrityError:
                raise Conflict(
                    f"battle {battle} already has a vote: a battle counts one vote. Begin a new battle."
                ) from None
        return stored

    def begin_battle(self, models: Sequence[str]) -> ArenaBattle:
        """Choose two models, in random order, whose comparison is the most informative.

        Raises UsageError for fewer than two models.
        """
        if len(set(models)) < 2:
            raise UsageError(f"a battle needs two models: {len(set(models))} available. Load another adapter.")
        pair = list(_choose_pair(sorted(set(models)), self._votes()))
        random.shuffle(pair)
        battle = ArenaBattle(f"bt-{secrets.token_hex(8)}", *pair)
        with self._open() as db:
            db.execute("INSERT INTO battles (id, a, b) VALUES (?, ?, ?)", (battle.id, battle.a, battle.b))
        return battle

    def rows(self, owner: str | None = None) -> list[FeedbackRow]:
        """Return all rows in the order of arrival, or those of one key."""
        where, parameters = ("", ()) if owner is None else (" WHERE owner = ?", (owner,))
        with self._open() as db:
            query = f"SELECT id, kind, created, body FROM feedback{where} ORDER BY number"  # noqa: S608
            rows = db.execute(query, parameters).fetchall()
        return [(StoredFeedback(row[0], row[1], row[2]), _parsed(row[3])) for row in rows]

    def delete(self, owner: str, name: str | None = None) -> int:
        """Permanently delete one row of a key, or all of them. Return the number of rows deleted."""
        condition, parameters = ("", (owner,)) if name is None else (" AND id = ?", (owner, name))
        with self._open() as db:
            db.execute("PRAGMA secure_delete = ON")
            return db.execute(f"DELETE FROM feedback WHERE owner = ?{condition}", parameters).rowcount  # noqa: S608

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each kind."""
        with self._open() as db:
            return dict(db.execute("SELECT kind, COUNT(*) FROM feedback GROUP BY kind ORDER BY kind"))

    def pairwise_votes(self) -> list[PairwiseVote]:
        """Return the votes for `ratings.rate`; a vote for 'both bad' counts as a tie.

        Votes between equal answers, which say nothing about the models, and rows that cannot be read are left out.
        """
        return [_pairwise(vote) for vote in self._votes() if not has_equal_answers(vote)]

    def _votes(self) -> list[Vote]:
        with self._open() as db:
            rows = db.execute("SELECT body FROM feedback WHERE kind = 'vote' ORDER BY number").fetchall()
        return [vote for (body,) in rows if isinstance(vote := _parsed(body), Vote)]

    def _check_battle(self, db: sqlite3.Connection, vote: Vote) -> None:
        found = db.execute("SELECT a, b FROM battles WHERE id = ?", (vote.battle,)).fetchone()
        if found is None:
            raise UsageError(f"unknown battle {vote.battle!r}: begin one with POST /v1/arena/battles.")
        if (vote.a.model, vote.b.model) != tuple(found):
            raise UsageError(
                f"the vote is between {vote.a.model} and {vote.b.model}: battle {vote.battle} is between {found[0]} "
                f"and {found[1]}, in this order."
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
                raise _convert_error(error, self.path) from error


def _forget_owners_of_battles(db: sqlite3.Connection) -> None:
    """Delete the owners of battles, which an earlier version stored and no user could delete."""
    if db.execute("SELECT 1 FROM pragma_table_info('battles') WHERE name = 'owner'").fetchone() is None:
        return
    if db.execute("SELECT 1 FROM battles WHERE owner IS NOT NULL LIMIT 1").fetchone() is not None:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("UPDATE battles SET owner = NULL WHERE owner IS NOT NULL")


def _convert_error(error: sqlite3.Error, path: Path) -> Exception:
    """Return our error for an SQLite error; for a full disk an OSError, which `raise_storage_full` converts."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return OSError(errno.ENOSPC, str(error))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return ServerBusy(f"{path} is locked by other writers: try again.")
    return ServeError(
        f"the feedback in {path} cannot be read or written ({error}): check the file's permissions, or move the file "
        "away to start a new one."
    )


def owner_of(authorization: str | None) -> str:
    """Return a digest of the API key, which identifies the key but does not reveal it."""
    key = (authorization or "").partition(" ")[2].strip()
    return hashlib.sha256(b"adapterhub feedback\0" + key.encode()).hexdigest()[:32]


def actor_of(authorization: str | None) -> str | None:
    """Return a short name of the API key for histories and logs; None without a key."""
    return f"key {owner_of(authorization)[:8]}" if authorization else None


def _parsed(body: str) -> Vote | Thumb | Correction | None:
    try:
        return _FEEDBACK.validate_json(body)
    except ValidationError:
        return None


def fault_of(feedback: Vote | Thumb | Correction) -> str | None:
    """Return why training cannot use the feedback; None where it can.

    A conversation is an optional system message, then user and assistant in turn, and each text has more than white
    space: the rules of train/data/conversation.py.
    """
    roles = [message.role for message in feedback.messages]
    turns = roles[1:] if roles[0] in _SYSTEM_ROLES else roles
    first = 1 + len(roles) - len(turns)
    for number, (role, expected) in enumerate(zip(turns, cycle(("user", "assistant")), strict=False), first):
        if role != expected:
            return f"message {number} has role {role!r} in place of {expected!r}"
    if len(turns) % 2 == 0:
        return "the last message is not the user's"
    texts = {f"message {number} ({one.role})": one.content for number, one in enumerate(feedback.messages, 1)}
    if isinstance(feedback, Vote):
        texts |= {"answer a": feedback.a.text, "answer b": feedback.b.text}
    else:
        texts |= {"the answer": feedback.answer.text}
    if isinstance(feedback, Correction):
        texts |= {"the correction": feedback.text}
    blank = next((name for name, text in texts.items() if not text.strip()), None)
    return None if blank is None else f"{blank} has no text"


def has_equal_answers(feedback: Vote | Thumb | Correction) -> bool:
    """Return whether the two answers that are compared have the same text, but for white space around it."""
    if isinstance(feedback, Vote):
        return feedback.a.text.strip() == feedback.b.text.strip()
    return isinstance(feedback, Correction) and feedback.text.strip() == feedback.answer.text.strip()


def winner_of(vote: Vote) -> Winner:
    """Return the winner of a vote; 'both bad' counts as a tie."""
    return "tie" if vote.winner == "both_bad" else vote.winner


def _pairwise(vote: Vote) -> PairwiseVote:
    return PairwiseVote(vote.a.model, vote.b.model, winner_of(vote))


def _choose_pair(models: Sequence[str], votes: Sequence[Vote]) -> tuple[str, str]:
    """Draw a pair of models; its weight is p (1 - p) / (1 + n) for win probability p and n votes so far.

    Pairs with similar ratings and few votes are drawn more often: their votes are the most informative. Votes between
    equal answers count among the n, so that models which always answer alike are not drawn again and again.
    """
    names = set(models)
    relevant = [vote for vote in votes if {vote.a.model, vote.b.model} <= names]
    rated = {
        one.model: one.rating for one in rate([_pairwise(v) for v in relevant if not has_equal_answers(v)]).ratings
    }
    games = Counter(frozenset((vote.a.model, vote.b.model)) for vote in relevant)
    pairs = list(combinations(models, 2))

    def weight(a: str, b: str) -> float:
        chance = 1 / (1 + 10 ** ((rated.get(b, 1000.0) - rated.get(a, 1000.0)) / 400))
        return chance * (1 - chance) / (1 + games[frozenset((a, b))])

    return random.choices(pairs, [weight(a, b) for a, b in pairs])[0]  # noqa: S311 (no secret)
