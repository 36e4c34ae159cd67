"""Data through the `datasets` library: folders it wrote, and messages when library, Hub or split is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from oasst_tree import TREE

from adapterhub.errors import DatasetError, RecipeError, UsageError
from train.data.formats import FormatName
from train.data.hf_datasets import _known, known_dataset
from train.data.sources import read_source
from train.recipe import Recipe

datasets = pytest.importorskip("datasets")
ROWS = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(3)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe(folder: Path, path: str, **data: Any) -> Recipe:
    raw = {"name": "x", "base": "x", "data": {"source": "datasets", "path": path, **data}, "train": {"steps": 1}}
    found = Recipe.model_validate(raw)
    found._folder = folder
    return found


def refusal(folder: Path, path: str, **data: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        read_source(recipe(folder, path, **data))
    return str(caught.value)


def test_a_folder_the_library_saved(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    source = read_source(recipe(tmp_path, "./saved"))
    assert [item.where for item in source.examples] == [f"./saved row {n}" for n in (1, 2, 3)]


def test_a_folder_with_several_splits(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert len(read_source(recipe(tmp_path, "./saved")).examples) == 3
    assert len(read_source(recipe(tmp_path, "./saved", split="test")).examples) == 1
    text = refusal(tmp_path, "./saved", split="dev")
    assert "./saved (it has the splits train, test): expected subset default, split dev" in text


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "set" / "train.parquet")
    assert len(read_source(recipe(tmp_path, "./set")).examples) == 3
    assert 'Unknown split "dev"' in refusal(tmp_path, "./set", split="dev")


def test_messages_of_trees_come_through_the_library_as_from_a_file(tmp_path: Path) -> None:
    datasets.Dataset.from_list(TREE).save_to_disk(tmp_path / "oasst")
    (talk,) = read_source(recipe(tmp_path, "./oasst")).examples
    assert [message.content for message in talk.messages] == ["text p", "text a0", "text q0", "text a3"]  # type: ignore[union-attr]


def test_keys_that_arrow_adds_to_objects_say_nothing(tmp_path: Path) -> None:
    call = {"function": {"name": "look", "arguments": {"town": "T"}}}
    other = {"function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"messages": [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "Yes.", "tool_calls": [made]},
            {"role": "tool", "content": "done", "tool_call_id": "1"},
            {"role": "assistant", "content": "Done.", "weight": 1},
        ]}
        for made in (call, other)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    talks = read_source(recipe(tmp_path, "./saved")).examples
    made = [json.loads(talk.messages[1].tool_calls)[0]["function"] for talk in talks]  # type: ignore[union-attr]
    assert made == [call["function"], other["function"]]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    text = refusal(tmp_path, "./none")
    assert "none is not a folder): expected subset default, split train. Check path, subset and split" in text


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = refusal(tmp_path, "tatsu-lab/alpaca")
    assert "cannot fetch data set tatsu-lab/alpaca (" in text
    assert 'path = "./FOLDER"' in text


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (httpx.ConnectTimeout("too slow"), "(too slow): expected an answer from the Hub"),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot read data set tatsu-lab/alpaca (Dataset scr"),
        (ImportError("To support decoding audio, install it"), "cannot read data set tatsu-lab/alpaca (To support"),
    ],
)
def test_what_the_library_raises_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, words: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert words in refusal(tmp_path, "tatsu-lab/alpaca")


def test_rows_that_cannot_be_decoded(tmp_path: Path) -> None:
    found = datasets.Dataset.from_list([{"picture": {"bytes": b"no picture", "path": None}}])
    found.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "saved")
    text = refusal(tmp_path, "./saved")
    assert "cannot read data set ./saved (" in text
    assert "expected subset default, split train" in text


def test_a_folder_in_a_home_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown user in '~nobody-of-this-name/x'"):
        read_source(recipe(tmp_path, "~nobody-of-this-name/x"))


def test_the_library_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "Run `pip install datasets`" in refusal(tmp_path, "./saved")


def test_the_papers_sets_are_known_by_their_short_names() -> None:
    names = {"alpaca", "alpaca-clean", "chip2", "self-instruct", "hh-rlhf", "longform", "guanaco", "oasst1"}
    assert set(_known()) == names
    assert {entry.format for entry in _known().values()} <= set(get_args(FormatName))
    assert known_dataset("tatsu-lab/alpaca") is None


def test_feedback_is_not_read_by_the_trainer_itself(tmp_path: Path) -> None:
    wanted = {"name": "x", "base": "x", "data": {"source": "feedback"}, "train": {"steps": 1}}
    with pytest.raises(RecipeError, match="adapterhub feedback export"):
        read_source(Recipe.model_validate(wanted))
