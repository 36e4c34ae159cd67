"""Tests of adapterhub.bases.self_check_cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.bases import self_check_cache
from adapterhub.bases.self_check_cache import is_proven, remember
from adapterhub.paths import HOME_VARIABLE


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_passed_is_proven() -> None:
    assert not is_proven("train", "sha256:1", dtype="float32")
    remember("train", "sha256:1", dtype="float32")
    assert is_proven("train", "sha256:1", dtype="float32")


@pytest.mark.parametrize(
    ("kind", "fingerprint", "dtype"),
    [("serve", "sha256:1", "float32"), ("train", "sha256:2", "float32"), ("train", "sha256:1", "bfloat16")],
)
def test_another_question_is_not_proven(kind: str, fingerprint: str, dtype: str) -> None:
    remember("train", "sha256:1", dtype="float32")
    assert not is_proven(kind, fingerprint, dtype=dtype)


def test_another_version_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    remember("train", "sha256:1")
    monkeypatch.setattr(self_check_cache, "version", lambda package: "another")
    assert not is_proven("train", "sha256:1")


@pytest.mark.parametrize("bytes_", [b"", b"{", b"[]", b"\xff\xfe", b'{"kind": "train"}'])
def test_a_damaged_record_is_no_record(data_folder: Path, bytes_: bytes) -> None:
    remember("train", "sha256:1")
    (path,) = (data_folder / "self-checks").iterdir()
    path.write_bytes(bytes_)
    assert not is_proven("train", "sha256:1")
    remember("train", "sha256:1")
    assert is_proven("train", "sha256:1")


def test_a_folder_that_cannot_be_written_to_is_no_error(data_folder: Path) -> None:
    data_folder.write_text("a file is in its place")
    remember("train", "sha256:1")
    assert not is_proven("train", "sha256:1")
