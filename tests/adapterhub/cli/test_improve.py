"""The command `improve`, trained for real on the tiny base: the name moves where it may, and only there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapterhub.adapter import Adapter, AdapterRef, StoredBase
from adapterhub.cli.main import app
from adapterhub.errors import SignatureInvalid
from adapterhub.feedback.promotion import Promotion
from adapterhub.feedback.store import STORE_NAME, Correction, FeedbackAnswer, FeedbackStore, PromptMessage
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry


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
