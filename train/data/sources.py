"""Read the examples of a recipe: from files, the `datasets` library, shipped data sets or the chatterbot corpus."""

from __future__ import annotations

import difflib
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from adapterhub.errors import DatasetError, RecipeError
from adapterhub.files import expanded
from train.data.conversation import Conversation, Message, Source
from train.data.formats import FormatName, OnFault, examples_of
from train.data.hf_datasets import known_dataset, read_dataset
from train.data.readers import Rows, read_rows
from train.recipe import ChatterbotData, DatasetsData, FeedbackData, Recipe, RowData, ShippedData


def read_source(recipe: Recipe) -> Source:
    """Read the examples that [data] of the recipe names. Raises DatasetError."""
    data = recipe.data
    if isinstance(data, ChatterbotData):
        return read_chatterbot(data.topic)
    if isinstance(data, ShippedData):
        return read_shipped(data.name)
    name, rows, format = rows_of(recipe)
    assert isinstance(data, RowData), "rows_of accepted it"
    return examples_of(rows, name=name, format=format, on_fault=data.on_fault)


def rows_of(recipe: Recipe) -> tuple[str, Rows, FormatName | None]:
    """Return (name, rows, format) of a recipe whose data are rows; format None: detect it. Raises DatasetError."""
    data = recipe.data
    if isinstance(data, FeedbackData):
        raise RecipeError(
            'the recipe has source = "feedback": expected a file of it. Run it with `adapterhub train`, which exports '
            'the feedback first, or use `adapterhub feedback export` and source = "file".'
        )
    assert isinstance(data, RowData), "the other sources have no rows"
    format = None if data.format == "auto" else data.format
    if isinstance(data, DatasetsData):
        known = known_dataset(data.path)
        return data.path, read_dataset(data, folder=recipe.folder), format or (known.format if known else None)
    path = recipe.folder / expanded(data.path)
    return path.name, read_rows(path), format


def read_file(path: Path | Traversable, *, name: str, format: FormatName | None = None, on_fault: OnFault = "stop") -> Source:  # fmt: skip  # noqa: E501
    """Read the examples of a file. Raises DatasetError, with file:line for each fault."""
    return examples_of(read_rows(path), name=name, format=format, on_fault=on_fault)


def read_shipped(name: str) -> Source:
    """Read a shipped data set, `train/datasets/<name>.jsonl`. Raises DatasetError for an unknown name."""
    folder = package_files("train") / "datasets"
    names = _stems(folder, ".jsonl")
    if name not in names:
        raise DatasetError(f"no shipped data set {name!r}: expected {nearest(name, names)}. Correct name in [data].")
    return read_file(folder / f"{name}.jsonl", name=name, format="chat")


def read_chatterbot(topic: str) -> Source:
    """Read a topic of the English chatterbot corpus: the question and the first answer of each entry.

    Further texts of an entry are alternative answers in some topics and later turns in others, without a mark, so only
    the first answer is used. Raises DatasetError for an unknown topic, and when the package is not installed.
    """
    folder = _chatterbot_folder()
    topics = _stems(folder, ".yml")
    if topic not in topics:
        raise DatasetError(
            f"no topic {topic!r} in the chatterbot corpus: expected {nearest(topic, topics)}. Correct topic in [data]."
        )
    try:
        entries = yaml.safe_load((folder / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise DatasetError(
            f"cannot parse {topic}.yml of the chatterbot corpus ({error!r}): expected a list of conversations. "
            "Reinstall chatterbot-corpus."
        ) from error
    name = f"chatterbot {topic}"
    conversations = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, list) and len(entry) >= 2 and all(str(text).strip() for text in entry[:2]):
            question, answer = (str(text).strip() for text in entry[:2])
            messages = (Message("user", question), Message("assistant", answer))
            conversations.append(Conversation(messages, f"{topic}.yml entry {number}"))
    left_out = len(entries) - len(conversations)
    notes = (
        (f"left out {left_out} of {len(entries)} entries that are not a question and an answer",) if left_out else ()
    )
    return Source(name, tuple(conversations), notes)


def nearest(name: str, names: list[str]) -> str:
    """Return the names most similar to `name`, or all names when none is similar, joined for a message."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return " or ".join(near) if near else f"one of {', '.join(names)}"


def _chatterbot_folder() -> Traversable:
    try:
        return package_files("chatterbot_corpus") / "data" / "english"
    except ModuleNotFoundError as error:
        raise DatasetError(
            'the chatterbot corpus is not installed: source = "chatterbot" needs it. Run `pip install '
            "chatterbot-corpus`, or use another source."
        ) from error


def _stems(folder: Traversable, suffix: str) -> list[str]:
    return sorted(item.name.removesuffix(suffix) for item in folder.iterdir() if item.name.endswith(suffix))
