"""Files of rows: every type with the line of each row, and faults of damaged ones."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from adapterhub.errors import DatasetError
from train.data.readers import Rows, read_rows


def rows(folder: Path, name: str, content: str | bytes) -> Rows:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path)


def places(found: Rows) -> list[tuple[str, str]]:
    return [(row.where.rpartition(":")[2], str(next(iter(row.value.values())))) for row in found.rows]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', [("1", "1"), ("3", "2")]),
        ("a.json", '[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n', [("2", "1"), ("4", "2"), ("5", "3")]),
        ("a.json", '{"a": 1}', [("1", "1")]),
        ("a.csv", 'a,b\n1,x\n"2\nlines",y\n3,z\n', [("2", "1"), ("3", "2\nlines"), ("5", "3")]),
        ("a.tsv", 'a\tb\n1\tx, y\n', [("2", "1")]),
        ("a.csv", "a;b\n1;x, y\n", [("2", "1")]),
        ("a.csv", "a\n1\n", [("2", "1")]),
        ("a.txt", "One.\r\nTwo.\r\n\r\n\r\nThree.\r\n", [("1", "One.\nTwo."), ("5", "Three.")]),
        ("a.txt", "One.\nTwo.\n\n\nThree.\n", [("1", "One.\nTwo."), ("5", "Three.")]),
        ("a.JSONL", '\ufeff{"a": 1}', [("1", "1")]),
    ],
)  # fmt: skip
def test_each_row_has_its_line(tmp_path: Path, name: str, content: str, expected: list[tuple[str, str]]) -> None:
    found = rows(tmp_path, name, content)
    assert places(found) == expected
    assert found.faults == ()


def test_a_chatml_file_is_one_conversation_up_to_a_blank_line_between_turns(tmp_path: Path) -> None:
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    first = turn.format("user", "Hi?\n\nYou!") + turn.format("assistant", "Ho.")
    second = turn.format("user", "And?") + turn.format("assistant", "Hum.")
    found = rows(tmp_path, "a.txt", f"{first}\n{second}")
    assert [row.value["text"] for row in found.rows] == [first.strip(), second.strip()]
    assert [row.where for row in found.rows] == ["a.txt:1", "a.txt:8"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("paragraph", ["Some words.", "<|im_start|>user\nHi?<|im_end|>"], ids=["text", "chatml"])
def test_a_long_text_file_is_read_in_one_pass(tmp_path: Path, paragraph: str) -> None:
    count = 100_000  # counting lines from the start for each would take many minutes
    found = rows(tmp_path, "a.txt", f"{paragraph}\n\n" * count)
    height = paragraph.count("\n") + 2
    assert [row.where for row in found.rows] == [f"a.txt:{1 + height * number}" for number in range(count)]


def test_a_gzipped_file_reads_like_the_file(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
    assert [(row.where, row.value) for row in found.rows] == [("a.jsonl.gz:1", {"a": 1})]


def test_line_separators_within_a_json_text_end_no_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour"
    found = rows(tmp_path, "a.jsonl", json.dumps({"a": text}, ensure_ascii=False))
    assert [row.value for row in found.rows] == [{"a": text}]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", '{"a": 1}\n{', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.json", '[{"a": 1},\n{"a": ]', "a.json:2: not JSON"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "a.json:2: not JSON (expected a comma"),
        ("a.json", '[{"a": 1},', "a.json:1: not JSON (the list does not end)"),
        ("a.json", "[1]", "a.json:1: not a JSON object"),
        ("a.json", '[{"a": 1}]\n\n[{"a": 2}]', "a.json:3: not JSON (unexpected text after the end)"),
        ("a.json", '{"a": 1}\n]', "a.json:2: not JSON (unexpected text after the end)"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: 3 columns, expected 2 as in the first line"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv:2: not a table (unexpected end of data; nothing after it is read)"),
        ("a.csv", 'a,b\n"1"2,3\n4,5\n', "a.csv:2: not a table (',' expected after '\"'; nothing after it is read)"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv:1: the column 'a' twice"),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 3}', "a.jsonl:1: not JSON (the key 'a' twice)"),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', "a.json:1: not JSON (the key 'b' twice"),
    ],
)
def test_what_is_not_a_row_is_reported_with_its_line(tmp_path: Path, name: str, content: str, fault: str) -> None:
    found = rows(tmp_path, name, content)
    assert len(found.faults) == 1
    assert found.faults[0].startswith(fault)


@pytest.mark.parametrize("name", ["a.arrow", "a", "a.pkl.gz"])
def test_a_file_of_an_unknown_kind(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        DatasetError, match=r"expected .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, optionally with .gz"
    ):
        rows(tmp_path, name, "x")


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read .*: expected UTF-8 text"):
        rows(tmp_path, "a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100)[:-12])


def test_a_gzip_file_of_no_known_compression(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read .*: expected UTF-8 text"):
        rows(tmp_path, "a.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:10] + b"\xff" * 20)


def test_a_path_with_a_zero_byte() -> None:
    with pytest.raises(DatasetError, match="embedded null byte"):
        read_rows(Path("a\0.jsonl"))


def test_a_field_longer_than_the_library_takes_unasked(tmp_path: Path) -> None:
    long = "x" * 200_000
    found = rows(tmp_path, "a.csv", f"a,b\n{long},1\ny,2\n")
    assert [row.value["a"] for row in found.rows] == [long, "y"]


def test_a_gzip_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read .*: expected UTF-8 text"):
        rows(tmp_path, "a.jsonl.gz", '{"a": 1}')


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '[\n {"a": 1},\n {"a": 2}\n]',
            "is one JSON list: expected a row on each line. Rename it to .json.",
        ),
        ("a.jsonl", '[{"a": 1}]', "is one JSON list"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "has more than one JSON object: expected one list. Rename it to .jsonl."),
    ],
)
def test_a_file_under_the_suffix_of_another_kind(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(DatasetError, match=f"{name} {words}"):
        rows(tmp_path, name, content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\ncafé,1".encode("cp1252"), r"\(byte 0xe9 in line 2; .*iconv -f WINDOWS-1252 -t UTF-8 a.csv > utf8-a.csv"),
        ("a,b\ncafé,1".encode("utf-16"), "begins as UTF-16 does.*iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_another_encoding_is_named_with_the_way_to_convert_it(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        rows(tmp_path, "a.csv", content)


def test_a_parquet_file_has_rows_without_the_nulls_of_its_structs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = [{"a": [{"b": 1}, {"c": 2}], "d": None}, {"a": [], "d": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    found = read_rows(tmp_path / "a.parquet")
    assert [(row.where, row.value) for row in found.rows] == [
        ("a.parquet row 1", {"a": [{"b": 1}, {"c": 2}], "d": None}),
        ("a.parquet row 2", {"a": [], "d": "x"}),
    ]


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DatasetError, match="expected a parquet file"):
        rows(tmp_path, "a.parquet", "x")


def test_a_parquet_file_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r'pip install "adapterhub\[datasets\]"'):
        rows(tmp_path, "a.parquet", "x")
