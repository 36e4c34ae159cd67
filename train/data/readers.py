"""Read rows with their line numbers from JSONL, JSON, CSV, TSV and text files, gzipped or not.

train/data/formats.py parses the rows.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from adapterhub.errors import DatasetError


@dataclass(frozen=True)
class Row:
    """A row and its place, `file:line`."""

    where: str
    value: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of a file, and the faults of its other lines."""

    rows: tuple[Row, ...]
    faults: tuple[str, ...]
    """Lines that are not rows, each as `file:line: what is wrong`."""


def read_rows(path: Path | Traversable) -> Rows:
    """Read all rows of a file in order. Raises DatasetError for a file that cannot be read or has an unknown suffix."""
    name = path.name.removesuffix(".gz")
    read = _READERS.get(f".{name.rpartition('.')[2].lower()}" if "." in name else "")
    if read is None:
        raise DatasetError(
            f"unknown file type of {path}: expected {', '.join(_READERS)}, optionally with .gz. Convert or rename the "
            "file."
        )
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DatasetError(
            f"cannot read {path} ({error}): expected UTF-8 text. Check path in [data], and the file."
        ) from error
    rows, faults = [], []
    for line, value in read(text):
        where = f"{path.name}:{line}"
        if isinstance(value, dict):
            rows.append(Row(where, value))
        else:
            faults.append(f"{where}: {value}")
    return Rows(tuple(rows), tuple(faults))


_Lines = Iterator[tuple[int, dict[str, Any] | str]]
"""Pairs of a line number and the row, or what is wrong with it."""


def _jsonl(text: str) -> _Lines:
    # Not splitlines: JSON strings may contain U+2028 and other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _object(line)


def _object(line: str) -> dict[str, Any] | str:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return raw if isinstance(raw, dict) else "not a JSON object"


def _json(text: str) -> _Lines:
    """Parse one object, or a list of objects one by one, so that each has its line."""
    decoder, place, line, end = json.JSONDecoder(), _skip(text, 0), 1, 0
    is_list = text[place : place + 1] == "["
    place = _skip(text, place + 1) if is_list else place
    while place < len(text) and text[place] != "]":
        line, end = line + text.count("\n", end, place), place
        try:
            raw, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON ({error})"
            return
        yield line, raw if isinstance(raw, dict) else "not a JSON object"
        place = _skip(text, place)
        if is_list and text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] not in ("]", ""):
            yield line + text.count("\n", end, place), "not JSON (expected a comma and the next object)"
            return
    if is_list and place >= len(text):
        yield line, "not JSON (the list does not end)"
    elif (rest := _skip(text, place + is_list)) < len(text):
        yield line + text.count("\n", end, rest), "not JSON (unexpected text after the end)"


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _table(delimiter: str) -> Callable[[str], _Lines]:
    def read(text: str) -> _Lines:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        # The limit of the csv module, 131,072, applies to the whole process and is shorter than some texts.
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))
        header: list[str] = []
        before = 0
        try:
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not cells:
                    continue
                if not header:
                    header = [cell.strip() for cell in cells]
                elif len(cells) != len(header):
                    yield line, f"{len(cells)} columns, expected {len(header)} as in the first line"
                else:
                    yield line, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            yield before + 1, f"not a table ({error})"

    return read


_CHATML_TURN = re.compile(r"<\|im_start\|>.*?<\|im_end\|>", re.DOTALL)


def _text(text: str) -> _Lines:
    """Split into paragraphs; split a ChatML file into conversations, at blank lines between turns."""
    if not _CHATML_TURN.search(text):
        for found in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text):
            yield 1 + text.count("\n", 0, found.start()), {"text": found.group().rstrip()}
        return
    begin = end = 0
    for turn in _CHATML_TURN.finditer(text):
        between = text[end : turn.start()]
        if end and between.strip() == "" and between.count("\n") > 1:
            yield 1 + text.count("\n", 0, begin), {"text": text[begin:end]}
            begin = turn.start()
        end = turn.end()
    yield 1 + text.count("\n", 0, _skip(text, begin)), {"text": text[begin:].strip()}


_READERS: dict[str, Callable[[str], _Lines]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".txt": _text,
}
