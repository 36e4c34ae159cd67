"""The record of a base in the local store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.adapter import BaseName
from adapterhub.bases.store import _Record, find_base, known_bases


@pytest.mark.parametrize("key", ["license", "licence"])
def test_record_of_this_and_of_earlier_versions(home: Path, key: str) -> None:
    folder = home / "bases" / "tiny"
    folder.mkdir(parents=True)
    record = {"id": "tests/tiny", "revision": None, "fingerprint": "fp1:" + "ab" * 32, key: "mit"}
    (folder / "base.json").write_text(json.dumps(record))
    assert find_base(BaseName.parse("tiny")).license == "mit"


def test_record_is_written_in_the_spelling_that_an_earlier_version_reads() -> None:
    record = _Record(id="tests/tiny", revision=None, fingerprint="fp1:" + "ab" * 32, license="mit")
    assert record.model_dump(by_alias=True)["licence"] == "mit"


def test_license_of_a_known_base() -> None:
    assert known_bases()["smollm2-135m-instruct"].license == "apache-2.0"
