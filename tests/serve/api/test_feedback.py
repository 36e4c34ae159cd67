"""Votes, thumbs and corrections: kept, counted once, deleted on request, and turned into training data."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import api_bench
import pytest
from api_bench import ASKED, Bench, answer, run, thumb
from feedback_rows import UNUSABLE
from typer.testing import CliRunner

from adapterhub.adapter import BaseName
from adapterhub.bases.store import pull_base
from adapterhub.cli.main import app
from adapterhub.errors import AdapterHubError, Conflict, ServeError, ServerBusy, StorageFull, UsageError
from adapterhub.feedback.export import export_rows
from adapterhub.feedback.store import Correction, FeedbackStore, StoredFeedback, Vote, owner_of
from serve.api.auth import ApiKeys


def vote(battle: str, winner: str, a: str = "captain", b: str = "poet") -> Vote:
    return Vote.model_validate(
        {"kind": "vote", "battle": battle, "messages": ASKED, "a": answer(a, "from a"), "b": answer(b, "from b"),
         "winner": winner}
    )  # fmt: skip


def correction(text: str = "Aye, captain.") -> Correction:
    return Correction.model_validate({"kind": "correction", "messages": ASKED, "answer": answer(), "text": text})


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    return FeedbackStore(tmp_path / "feedback.sqlite")


def voted(store: FeedbackStore, winner: str, owner: str = "me") -> Vote:
    battle = store.begin_battle(["captain", "poet"])
    cast = vote(battle.id, winner, battle.a, battle.b)
    store.add(cast, owner=owner)
    return cast


def test_a_vote_counts_once(store: FeedbackStore) -> None:
    cast = voted(store, "a")
    with pytest.raises(Conflict, match="a battle counts one vote"):
        store.add(cast.model_copy(update={"winner": "b"}), owner="somebody else")
    assert [given.winner for _, given in store.rows() if isinstance(given, Vote)] == ["a"]


def test_a_vote_must_match_its_battle(store: FeedbackStore) -> None:
    with pytest.raises(UsageError, match="unknown battle"):
        store.add(vote("bt-made-up", "a"), owner="me")
    battle = store.begin_battle(["captain", "poet"])
    with pytest.raises(UsageError, match="the vote is between"):
        store.add(vote(battle.id, "a", "captain", "unknown"), owner="me")
    with pytest.raises(UsageError, match="needs two models"):
        store.begin_battle(["captain", "captain"])


def test_votes_race_and_one_wins(store: FeedbackStore) -> None:
    battle = store.begin_battle(["captain", "poet"])
    outcomes: list[str] = []

    def cast(winner: str) -> None:
        try:
            store.add(vote(battle.id, winner, battle.a, battle.b), owner=winner)
            outcomes.append("kept")
        except Conflict:
            outcomes.append("refused")

    threads = [threading.Thread(target=cast, args=(winner,)) for winner in ("a", "b", "tie", "both_bad") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(outcomes) == {"kept": 1, "refused": 11}


def test_a_key_sees_and_deletes_its_own(store: FeedbackStore) -> None:
    mine, theirs = store.add(thumb(), owner="me"), store.add(correction("Avast!"), owner="them")
    assert [kept for kept, _ in store.rows("me")] == [mine]
    assert store.delete("me", theirs.id) == 0
    assert store.delete("them") == 1
    assert store.counts() == {"thumb": 1}
    assert b"Avast" not in b"".join(
        path.read_bytes() for path in store.path.parent.iterdir() if path.name == store.path.name
    )


def test_pairs_that_teach_most_come_more_often(store: FeedbackStore) -> None:
    """Old rivals have met often and one always wins; a newcomer is drawn with either of them instead."""
    for _ in range(12):
        battle = store.begin_battle(["old", "champion"])
        store.add(vote(battle.id, "a" if battle.a == "champion" else "b", battle.a, battle.b), owner="me")
    drawn = Counter(
        frozenset((one.a, one.b)) for one in (store.begin_battle(["old", "champion", "new"]) for _ in range(60))
    )
    assert drawn[frozenset(("old", "champion"))] < 10
    assert min(drawn[frozenset(("old", "new"))], drawn[frozenset(("champion", "new"))]) > 10


def test_models_that_answer_alike_are_not_drawn_again_and_again(store: FeedbackStore) -> None:
    for _ in range(12):
        battle = store.begin_battle(["captain", "copy"])
        cast = vote(battle.id, "tie", battle.a, battle.b)
        store.add(cast.model_copy(update={"b": cast.b.model_copy(update={"text": cast.a.text})}), owner="me")
    assert store.pairwise_votes() == []
    drawn = Counter(frozenset((b.a, b.b)) for b in (store.begin_battle(["captain", "copy", "new"]) for _ in range(60)))
    assert drawn[frozenset(("captain", "copy"))] < 15


def test_both_sides_are_left_about_as_often(store: FeedbackStore) -> None:
    left = Counter(store.begin_battle(["captain", "poet"]).a for _ in range(60))
    assert min(left["captain"], left["poet"]) > 10


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    folders = [str(Path(api_bench.__file__).parent), str(Path(__file__).parents[3])]
    script = (
        f"import sys; sys.path[:0] = {folders!r}\n"
        "from pathlib import Path; from adapterhub.feedback.store import FeedbackStore; "
        "from api_bench import thumb\n"
        f"store = FeedbackStore(Path({str(path)!r}))\n"
        "while True: print(store.add(thumb(), owner='me').id, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [writer.stdout.readline().strip() for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    told += writer.stdout.read().split()[:-1]  # the last line may be torn
    writer.wait()
    writer.stdout.close()
    assert set(told) <= {kept.id for kept, _ in FeedbackStore(path).rows()}


@contextmanager
def opened_with(monkeypatch: pytest.MonkeyPatch, *pragmas: str) -> Iterator[None]:
    """Let the store open its file without waiting, and with more pragmas."""
    connect = sqlite3.connect

    def impatient(path: Path, timeout: float) -> sqlite3.Connection:
        db = connect(path, timeout=0)
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}")
        return db

    with monkeypatch.context() as patched:
        patched.setattr("adapterhub.feedback.store.sqlite3.connect", impatient)
        yield


def test_disk_that_is_full(store: FeedbackStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(thumb(), owner="me")
    long = correction("Aye. " * 20_000)
    with opened_with(monkeypatch, "max_page_count = 1"), pytest.raises(StorageFull, match="the disk is full"):
        store.add(long, owner="me")
    assert store.counts() == {"thumb": 1}


def test_file_that_another_writes(store: FeedbackStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(thumb(), owner="me")
    with closing(sqlite3.connect(store.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with opened_with(monkeypatch), pytest.raises(ServerBusy, match="try again"):
            store.add(thumb(), owner="me")
    assert store.counts() == {"thumb": 1}


def test_file_that_is_no_database(store: FeedbackStore) -> None:
    store.path.write_bytes(b"Avast! " * 1000)
    for act in (store.counts, store.pairwise_votes, store.rows):
        with pytest.raises(ServeError, match=r"feedback\.sqlite cannot be read or written .*move the file away"):
            act()


def test_folder_in_the_file_s_place(store: FeedbackStore) -> None:
    store.path.mkdir()
    with pytest.raises(ServeError, match="cannot be read or written"):
        store.begin_battle(["captain", "poet"])


def test_battles_of_an_earlier_version(store: FeedbackStore) -> None:
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("CREATE TABLE battles (id TEXT PRIMARY KEY, created INTEGER, owner TEXT, a TEXT, b TEXT)")
        db.execute("INSERT INTO battles VALUES ('bt-1', 1, 'the digest of a key', 'captain', 'poet')")
    voted(store, "a")
    assert len(store.pairwise_votes()) == 1
    with closing(sqlite3.connect(store.path)) as db:
        assert db.execute("SELECT DISTINCT owner FROM battles").fetchall() == [(None,)]
    assert b"the digest of a key" not in store.path.read_bytes()


def test_ratings_read_votes_alone(store: FeedbackStore) -> None:
    voted(store, "a")
    store.add(thumb(), owner="me")
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("UPDATE feedback SET body = 'torn' WHERE kind = 'thumb'")
    assert len(store.pairwise_votes()) == 1


def test_formats_for_trainers() -> None:
    given = [vote("1", "a"), vote("2", "tie"), vote("3", "both_bad"), thumb("up"), thumb("down"), correction()]
    rows = [(StoredFeedback(f"fb-{number}", one.kind, 1), one) for number, one in enumerate(given, start=1)]
    said = {text: [{"role": "assistant", "content": text}] for text in ("from a", "from b", "Aye.", "Aye, captain.")}
    assert export_rows(rows, "dpo").lines == [
        {"id": "fb-1", "prompt": ASKED, "chosen": said["from a"], "rejected": said["from b"]},
        {"id": "fb-6", "prompt": ASKED, "chosen": said["Aye, captain."], "rejected": said["Aye."]},
    ]
    labels = [(line["completion"][0]["content"], line["label"]) for line in export_rows(rows, "kto").lines]
    assert labels == [
        ("from a", True), ("from b", False), ("from a", False), ("from b", False), ("Aye.", True), ("Aye.", False),
        ("Aye, captain.", True), ("Aye.", False),
    ]  # fmt: skip
    assert export_rows(rows, "sft").lines == [
        {"id": name, "prompt": ASKED, "completion": said[text]}
        for name, text in (("fb-1", "from a"), ("fb-4", "Aye."), ("fb-6", "Aye, captain."))
    ]
    assert [line["winner"] for line in export_rows(rows, "votes").lines] == ["a", "tie", "tie"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_our_trainer_reads_what_is_exported(tmp_path: Path, method: str) -> None:
    from transformers import AutoTokenizer

    from train.data.preferences import read_preferences
    from train.data.readers import read_rows

    tokenizer = AutoTokenizer.from_pretrained(pull_base(BaseName.parse("smollm2-135m-instruct")).path)
    rows = [(StoredFeedback("fb-1", one.kind, 1), one) for one in (vote("1", "a"), correction(), thumb("down"))]
    lines = export_rows(rows, method).lines  # type: ignore[arg-type]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_preferences(
        read_rows(tmp_path / "f.jsonl"), tokenizer, name="feedback", method=method,  # type: ignore[arg-type]
        held_out=0.0, max_length=512, seed=0,
    )  # fmt: skip
    assert len(found.train) == {"dpo": 2, "kto": 4}[method]  # the disliked answer is the corrected one: once


def test_the_command_exports_and_counts(store: FeedbackStore, tmp_path: Path) -> None:
    store.add(correction(), owner="me")
    out, where = tmp_path / "dpo.jsonl", ["--store", str(store.path)]
    outcome = CliRunner().invoke(app, ["feedback", "export", "--format", "dpo", "-o", str(out), *where])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(out.read_text())["chosen"][0]["content"] == "Aye, captain."
    assert "correction" in CliRunner().invoke(app, ["feedback", "stats", *where]).stdout
    missing = CliRunner().invoke(app, ["feedback", "stats", "--store", str(tmp_path / "no")])
    assert isinstance(missing.exception, AdapterHubError)


def test_the_old_name_of_the_votes_format_is_accepted(store: FeedbackStore) -> None:
    voted(store, "a")
    where = ["--store", str(store.path)]
    new, old = (
        CliRunner().invoke(app, ["feedback", "export", "--format", name, *where]) for name in ("votes", "verdicts")
    )
    assert json.loads(new.stdout)["winner"] == "a"
    assert new.stdout == old.stdout
    unknown = CliRunner().invoke(app, ["feedback", "export", "--format", "csv", *where])
    assert (unknown.exit_code, "expected dpo, kto, sft, votes" in unknown.output) == (2, True)


# Over HTTP


def test_the_whole_arena_over_http(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        begun = await b.client.post("/v1/arena/battles", json={"models": ["captain", "poet"]})
        assert begun.status_code == 201
        battle = begun.json()
        body = {"kind": "vote", "battle": battle["battle"], "messages": ASKED, "a": answer(battle["a"]),
                "b": answer(battle["b"], "Yes."), "winner": "a"}  # fmt: skip
        assert (await b.client.post("/v1/feedback", json=body)).status_code == 201
        again = await b.client.post("/v1/feedback", json=body)
        assert again.status_code == 409
        assert again.json()["error"]["code"] == "conflict"
        rated = (await b.client.get("/v1/ratings")).json()
        assert rated["ratings"][0]["model"] == battle["a"]
        assert rated["notes"]  # one-sided after a single vote
        assert (await b.client.get("/v1/feedback/counts")).json() == {"vote": 1}
        assert (await b.client.post("/v1/arena/battles", json={"models": ["captain", "nobody"]})).status_code == 404
        drawn = (await b.client.post("/v1/arena/battles", json={})).json()
        assert {drawn["a"], drawn["b"]} < {"base", "captain", "poet"}

    run(tmp_path, test)


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "shout"},
        {"kind": "thumb", "messages": ASKED, "answer": answer(), "thumb": "sideways"},
        {"kind": "correction", "messages": [], "answer": answer(), "text": "x"},
        {"kind": "correction", "messages": ASKED, "answer": answer(), "text": ""},
        {"kind": "thumb", "messages": ASKED, "answer": answer(text="x" * 300_000), "thumb": "up"},
        {"kind": "correction", "messages": ASKED, "answer": answer(), "text": "Aye."},
    ],
)
def test_malformed_feedback_is_refused(tmp_path: Path, body: dict[str, Any]) -> None:
    async def test(b: Bench) -> None:
        refused = await b.client.post("/v1/feedback", json=body)
        assert refused.status_code == 400
        assert (await b.client.get("/v1/feedback")).json()["data"] == []

    run(tmp_path, test)


@pytest.mark.parametrize("name", UNUSABLE)
def test_feedback_that_training_cannot_use_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    async def test(b: Bench) -> None:
        body = UNUSABLE[name]
        if isinstance(body, str):
            pytest.skip("no request")
        refused = await b.client.post("/v1/feedback", json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"]) == (400, "invalid_request_error")
        assert error["message"].startswith("training cannot use this feedback: ")
        assert (await b.client.get("/v1/feedback")).json()["data"] == []

    run(tmp_path, test)


def test_a_row_that_cannot_be_read_is_listed_and_can_be_deleted(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        assert b.services.feedback is not None
        store = b.services.feedback
        name = store.add(thumb(), owner=owner_of(None)).id
        with closing(sqlite3.connect(store.path)) as db, db:
            db.execute("UPDATE feedback SET body = 'torn'")
        (listed,) = (await b.client.get("/v1/feedback")).json()["data"]
        assert (listed["id"], listed["kind"]) == (name, "thumb")
        assert (await b.client.delete(f"/v1/feedback/{name}")).json() == {"deleted": 1}

    run(tmp_path, test)


def test_keys_keep_feedback_apart_and_are_not_kept(tmp_path: Path) -> None:
    one, other = ({"authorization": f"Bearer {key}"} for key in ("first-key", "second-key"))

    async def test(b: Bench) -> None:
        assert (await b.client.get("/v1/ratings")).status_code == 401
        body = {"kind": "thumb", "messages": ASKED, "answer": answer(), "thumb": "up"}
        name = (await b.client.post("/v1/feedback", json=body, headers=one)).json()["id"]
        assert (await b.client.get("/v1/feedback", headers=other)).json()["data"] == []
        assert (await b.client.delete(f"/v1/feedback/{name}", headers=other)).json() == {"deleted": 0}
        assert b"first-key" not in b"".join(path.read_bytes() for path in tmp_path.glob("feedback.sqlite*"))
        assert (await b.client.delete("/v1/feedback", headers=one)).json() == {"deleted": 1}

    run(tmp_path, test, ApiKeys(asking=("first-key", "second-key")))
