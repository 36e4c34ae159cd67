"""The identity of a row is its place, not the `file:line` that messages name: several rows may share a line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from preference_rows import pair

from adapterhub.adapter import StoredBase
from train.data.formats import examples_of
from train.data.preferences import LabeledReply, read_preferences
from train.data.readers import Row, Rows, read_rows
from train.data.tokenization import prepare

_Values = Sequence[dict[str, Any]]


def _csv(values: _Values, line_end: str = "\n") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values[0]), lineterminator=line_end)
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue()


def _file(name: str, write: Callable[[_Values], str]) -> Callable[[Path, _Values], Rows]:
    def read(folder: Path, values: _Values) -> Rows:
        data = write(values).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return read_rows(folder / name)

    return read


def _parquet(folder: Path, values: _Values) -> Rows:
    from train.data.hf_datasets import read_dataset
    from train.recipe import DatasetsData

    datasets = pytest.importorskip("datasets")
    (folder / "data").mkdir()
    datasets.Dataset.from_list(list(values)).to_parquet(str(folder / "data" / "train.parquet"))
    return read_dataset(DatasetsData(source="datasets", path="./data"), folder=folder)


WAYS: dict[str, Callable[[Path, _Values], Rows]] = {
    "JSON on one line": _file("rows.json", json.dumps),
    "JSON on many lines": _file("rows.json", lambda values: json.dumps(values, indent=1)),
    "JSON with two rows on each line": _file(
        "rows.json",
        lambda values: "[" + ",\n".join(json.dumps(values[at : at + 2])[1:-1] for at in range(0, len(values), 2)) + "]",
    ),
    "compressed JSON": _file("rows.json.gz", json.dumps),
    "JSONL": _file("rows.jsonl", lambda values: "\n".join(map(json.dumps, values))),
    "CSV": _file("rows.csv", _csv),
    "parquet": _parquet,
    "rows of one name": lambda folder, values: Rows(tuple(Row("here:1", value) for value in values), ()),
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.path)


def _texts(samples: Sequence[Any], tokenizer: Any) -> list[str]:
    return [
        tokenizer.decode(sample.tokens, skip_special_tokens=True).rpartition("assistant\n")[2] for sample in samples
    ]


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("way", WAYS)
def test_each_pair_is_read_once(tmp_path: Path, tokenizer: Any, way: str, method: Any) -> None:
    """Eight pairs and a repeated one; of the eight, two are held out, and none is on both sides."""
    pairs = [pair(number) for number in range(8)]
    flat = [{key: row[key][0]["content"] for key in ("prompt", "chosen", "rejected")} for row in [*pairs, pairs[3]]]
    data = read_preferences(
        WAYS[way](tmp_path, flat), tokenizer, name="rows", method=method, held_out=0.25, max_length=64, seed=0
    )
    sides = [
        Counter(text.strip() for item in side for text in _texts(item.samples, tokenizer))
        for side in (data.train, data.held_out)
    ]
    assert sides[0] + sides[1] == Counter(f"{word} {n}." for n in range(8) for word in ("Aye,", "It is"))
    assert len(sides[1]) == 4
    assert not set(sides[0]) & set(sides[1])
    assert any("1 duplicate row" in note or "2 duplicate rows" in note for note in data.notes)
    labels = [(item.is_desirable, item.sample) for item in data.train if isinstance(item, LabeledReply)]
    assert all(_texts([sample], tokenizer)[0].startswith("Aye") == desirable for desirable, sample in labels)


@pytest.mark.parametrize("way", WAYS)
def test_each_conversation_is_read_once(tmp_path: Path, tokenizer: Any, way: str) -> None:
    values = [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in (*range(8), 3)]
    source = examples_of(WAYS[way](tmp_path, values), name="rows", format=None)
    data = prepare(source, tokenizer, held_out=0.25, max_length=64, loss_on="assistant", seed=0)
    sides = [[text.strip() for text in _texts(side, tokenizer)] for side in (data.train, data.held_out)]
    assert sorted(sides[0] + sides[1]) == [f"It is {n}." for n in range(8)]
    assert len(sides[1]) == 2
    assert data.notes[0].startswith("left out 1 duplicate: ")
