"""Where a recipe's examples come from: files, the `datasets` library, the shipped sets, the chatterbot corpus."""

from __future__ import annotations

import difflib
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path

from adapterhub.errors import DatasetError, RecipeError
from adapterhub.files import expanded
from train.data.conversation import Conversation, Message, Source
from train.data.formats import FormatName, OnFault, examples_of
from train.data.readers import Rows, read_rows
from train.recipe import ChatterbotData, DatasetsData, FeedbackData, Recipe, RowData, ShippedData


def read_source(recipe: Recipe) -> Source:
    """The examples the recipe's [data] names. Raises DatasetError."""
    data = recipe.data
    if isinstance(data, ChatterbotData):
        return read_chatterbot(data.topic)
    if isinstance(data, ShippedData):
        return read_shipped(data.name)
    name, rows, format = rows_of(recipe)
    assert isinstance(data, RowData), "rows_of took it"
    return examples_of(rows, name=name, format=format, on_fault=data.on_fault)


def rows_of(recipe: Recipe) -> tuple[str, Rows, FormatName | None]:
    """(name, rows, format; None: as the first row shows) of a recipe whose data are rows. Raises DatasetError."""
    data = recipe.data
    if isinstance(data, FeedbackData):
        raise RecipeError(
            "the recipe learns from a server's feedback, which `adapterhub train` writes to a file first: use that "
            'command, or `adapterhub feedback export` and source = "file".'
        )
    assert isinstance(data, RowData), "the other sources have no rows"
    format = None if data.format == "auto" else data.format
    if isinstance(data, DatasetsData):
        from train.data.hf_datasets import known_dataset, read_dataset

        known = known_dataset(data.path)
        return data.path, read_dataset(data, folder=recipe.folder), format or (known.format if known else None)
    path = recipe.folder / expanded(data.path)
    return path.name, read_rows(path), format


def read_file(path: Path | Traversable, *, name: str, format: FormatName | None = None, on_fault: OnFault = "stop") -> Source:  # fmt: skip  # noqa: E501
    """Raises DatasetError when the file cannot be read, and for its faults (file:line each)."""
    return examples_of(read_rows(path), name=name, format=format, on_fault=on_fault)


def read_shipped(name: str) -> Source:
    """A data set that comes with adapterhub (`train/datasets/<name>.jsonl`). Raises DatasetError with the names."""
    folder = package_files("train") / "datasets"
    names = _stems(folder, ".jsonl")
    if name not in names:
        raise DatasetError(f"no shipped data set is called {name!r}: {nearest(name, names)}.")
    return read_file(folder / f"{name}.jsonl", name=name, format="chat")


def read_chatterbot(topic: str) -> Source:
    """A topic of the English chatterbot corpus, one question and its first answer per entry.

    Longer entries hold alternative answers in one topic and later turns in another, and nothing tells which,
    so only the first answer counts. Raises DatasetError for an unknown topic, with the nearest names, and
    when the package is not installed.
    """
    folder = _chatterbot_folder()
    topics = _stems(folder, ".yml")
    if topic not in topics:
        raise DatasetError(f"the chatterbot corpus has no topic {topic!r}: {nearest(topic, topics)}.")
    import yaml

    try:
        entries = yaml.safe_load((folder / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise DatasetError(f"{topic}.yml of the chatterbot corpus is damaged ({error!r}): install it again.") from error
    name = f"chatterbot {topic}"
    conversations = []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, list) and len(entry) >= 2 and all(str(text).strip() for text in entry[:2]):
            question, answer = (str(text).strip() for text in entry[:2])
            messages = (Message("user", question), Message("assistant", answer))
            conversations.append(Conversation(messages, f"{topic}.yml entry {number}"))
    left_out = len(entries) - len(conversations)
    notes = (f"{left_out} of {len(entries)} entries are no question and answer: left out",) if left_out else ()
    return Source(name, tuple(conversations), notes)


def nearest(name: str, names: list[str]) -> str:
    """The names like it, as a question; all of them when none is."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def _chatterbot_folder() -> Traversable:
    try:
        return package_files("chatterbot_corpus") / "data" / "english"
    except ModuleNotFoundError as error:
        raise DatasetError(
            "the chatterbot corpus is not installed: run `pip install chatterbot-corpus`, or use another data source."
        ) from error


def _stems(folder: Traversable, suffix: str) -> list[str]:
    return sorted(item.name.removesuffix(suffix) for item in folder.iterdir() if item.name.endswith(suffix))
