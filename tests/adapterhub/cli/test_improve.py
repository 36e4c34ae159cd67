"""The command `improve`, trained for real on the tiny base: the name moves where it may, and only there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from feedback_rows import fifty_rows, store_all
from stopped_runs import StopAfter
from typer.testing import CliRunner

from adapterhub.adapter import Adapter, AdapterRef, StoredBase
from adapterhub.bases.loading import load_tokenizer
from adapterhub.cli.main import app
from adapterhub.errors import SignatureInvalid, TrainingStopped
from adapterhub.feedback.promotion import Promotion
from adapterhub.feedback.store import STORE_NAME, Correction, FeedbackAnswer, FeedbackStore, PromptMessage
from adapterhub.package.run_record import LOG_NAME, RunStart, read_run_events
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry
from train.data.preferences import read_preferences
from train.data.readers import read_rows
from train.recipe import PreferenceMethod


@pytest.fixture
def captain(home: Path, tiny_base: StoredBase, peft_folder: Path, tmp_path: Path) -> Adapter:
    """`captain` in the registry, its base in the store, and a dozen corrections of its answers."""
    place = home / "bases" / "tiny"
    shutil.copytree(tiny_base.path, place)
    ref = tiny_base.ref
    record = {"id": "tiny", "revision": None, "fingerprint": ref.fingerprint, "license": tiny_base.license}
    (place / "base.json").write_text(json.dumps(record))
    feedback = FeedbackStore(home / STORE_NAME)
    for number in range(12):
        asked = [PromptMessage(role="user", content=f"What is {number}?")]
        answer = FeedbackAnswer(model="captain", text="I do not know.")
        given = Correction(kind="correction", messages=asked, answer=answer, text=f"It is {number}.")
        feedback.add(given, owner="me")
    folder = shutil.copytree(peft_folder, tmp_path / "captain")
    return Registry(home).add(pack(folder, base=tiny_base, name="captain", license="mit"))


def _improve(*options: str, output: Path, answer: str | None = None) -> tuple[int, str, BaseException | None]:
    words = ["improve", "captain", "--steps", "1", "--batch-size", "1", "--output", str(output), *options]
    done = CliRunner().invoke(app, words, input=answer)
    return done.exit_code, done.output, done.exception


@pytest.mark.parametrize("by", ["option", "answer"])
def test_name_moves_to_the_candidate(captain: Adapter, home: Path, tmp_path: Path, by: str) -> None:
    options, answer = (["--promote"], None) if by == "option" else ([], "y\n")
    code, said, error = _improve(*options, output=tmp_path / "made", answer=answer)
    assert code == 0, error
    newest = Registry(home).resolve(AdapterRef.parse("captain"))
    assert newest.digest != captain.digest
    assert newest.manifest.license == "mit"
    assert f"captain points to the candidate; before, it pointed to {captain.digest}" in said


@pytest.mark.parametrize(("method", "num_lines"), [("dpo", 17), ("kto", 34 + 2 + 3)])
def test_from_fifty_votes_to_a_promoted_adapter(
    captain: Adapter, home: Path, tmp_path: Path, method: PreferenceMethod, num_lines: int
) -> None:
    """Ten rows are unusable, fifteen about other adapters: what is trained are the lines of the others, and no more."""
    (home / STORE_NAME).unlink()
    rows = fifty_rows(captain.digest)
    store_all(home / STORE_NAME, (row.body for row in rows))
    code, said, error = _improve("--promote", "--method", method, output=tmp_path / "made")
    assert code == 0, error
    assert f"exported {num_lines} lines" in said
    assert "left out 10 rows that training cannot use" in said
    assert "left out 15 rows about other adapters" in said
    assert Registry(home).resolve(AdapterRef.parse("captain")).digest != captain.digest

    expected = [line for row in rows if getattr(row, method) == "exported" for line in _lines_of(row.body, method)]
    assert len(expected) == num_lines
    (tmp_path / "expected.jsonl").write_text("\n".join(map(json.dumps, expected)))
    data = read_preferences(
        read_rows(tmp_path / "expected.jsonl"), load_tokenizer(StoredBase(home / "bases" / "tiny", captain.base)),
        name="expected", method=method, held_out=0.25, max_length=512, seed=0,
    )  # fmt: skip
    assert len(data.train) + len(data.held_out) == {"dpo": 16, "kto": 37}[method]  # a correction was given twice
    began = read_run_events(tmp_path / "made" / LOG_NAME)[0]
    assert isinstance(began, RunStart)
    assert (began.samples, began.data_sha256) == (len(data.train), data.digest)


def _lines_of(body: Any, method: str) -> list[dict[str, Any]]:
    """Write down what a usable row teaches, from its fields."""
    if body["kind"] == "thumb":
        labels = [(body["answer"]["text"], body["thumb"] == "up")]
    elif body["kind"] == "correction":
        labels = [(body["text"], True), (body["answer"]["text"], False)]
    else:
        labels = [(body[side]["text"], body["winner"] == side) for side in ("a", "b")]
    labels.sort(key=lambda one: not one[1])  # the better one first
    if method == "kto":
        return [{"prompt": body["messages"], "completion": _said(text), "label": label} for text, label in labels]
    (chosen,), (rejected,) = ([text for text, label in labels if label is wanted] for wanted in (True, False))
    return [{"prompt": body["messages"], "chosen": _said(chosen), "rejected": _said(rejected)}]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_name_that_comes_to_need_a_signature_stays(
    captain: Adapter, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is written during the run: neither the question is put, nor is the option obeyed."""
    (home / "policy.toml").write_text('[[trust]]\nnames = "captain"\nkeys = []\n')
    code, said, error = _improve(output=tmp_path / "made", answer="y\n")
    assert code == 0, error
    assert "captain cannot be moved to the candidate" in said
    assert "Point captain" not in said
    monkeypatch.setattr(Promotion, "check_before_run", lambda self: None)
    _, _, error = _improve("--promote", output=tmp_path / "again")
    assert isinstance(error, SignatureInvalid)
    assert [move.after for move in Registry(home).history("captain")] == [captain.digest]


def test_a_stopped_improvement_resumes_as_its_message_says(
    captain: Adapter, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, on a base whose name in the store is not its name on the Hub."""
    record = home / "bases" / "tiny" / "base.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"id": "owner/tiny-on-the-hub"}))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("train.trainer.progress_on", lambda stream: StopAfter(1))
    _, _, error = _improve("--steps", "3", output=tmp_path / "made")
    assert isinstance(error, TrainingStopped)
    found = re.search("resume with `adapterhub (.*)`", str(error))
    assert found
    done = CliRunner().invoke(app, shlex.split(found[1]))
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "made" / "adapter_model.safetensors").is_file()
