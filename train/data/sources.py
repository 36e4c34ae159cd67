"""Read the examples of a recipe: from files, the `datasets` library, shipped data sets or the chatterbot corpus."""

from __future__ import annotations

import difflib
from dataclasses import replace
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from adapterhub.errors import DatasetError, RecipeError
from adapterhub.files import expanded
from train.data.conversation import Conversation, Message, Source
from train.data.formats import FormatName, OnFault, arranged, examples_of
from train.data.hf_datasets import known_dataset, read_dataset
from train.data.readers import Rows, read_rows
from train.recipe import ChatterbotSource, DatasetsSource, FeedbackData, MixData, Recipe, RowSource, ShippedSource


def read_source(recipe: Recipe) -> Source:
    """Read the examples that [data] of the recipe names. Raises DatasetError."""
    data = recipe.data
    if not isinstance(data, MixData):
        return _read(data, recipe.folder)
    parts = tuple(replace(_read(entry, recipe.folder), weight=entry.weight) for entry in data.sources)
    examples = tuple(example for part in parts for example in part.examples)
    notes = tuple(f"{part.name}: {note}" for part in parts for note in part.notes)
    return Source(" + ".join(part.name for part in parts), examples, notes, parts=parts)


def _read(data: object, folder: Path) -> Source:
    if isinstance(data, ChatterbotSource):
        return read_chatterbot(data.topic)
    if isinstance(data, ShippedSource):
        return read_shipped(data.name)
    if isinstance(data, FeedbackData):
        raise RecipeError(
            'the recipe has source = "feedback": expected a file of it. Run it with `adapterhub train`, which exports '
            'the feedback first, or use `adapterhub feedback export` and source = "file".'
        )
    assert isinstance(data, RowSource), "the others are above"
    name, rows, format = rows_of(data, folder)
    return examples_of(rows, name=name, format=format, on_fault=data.on_fault)


def rows_of(data: RowSource, folder: Path) -> tuple[str, Rows, FormatName | None]:
    """Return (name, rows, format) of data that are rows; format None: detect it. Raises DatasetError.

    A relative path starts at `folder`.
    """
    format = None if data.format == "auto" else data.format
    if isinstance(data, DatasetsSource):
        known = known_dataset(data.path)
        name, rows = data.path, read_dataset(data, folder=folder)
        format = format or (known.format if known else None)
    else:
        path = folder / expanded(data.path)
        name, rows = path.name, read_rows(path)
    return name, arranged(rows, columns=data.columns or {}, ignore=data.ignore), format


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
