"""Read rows with their line numbers from JSONL, JSON, CSV, TSV, text and parquet files.

train/data/formats.py parses the rows.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
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
    suffix = f".{name.rpartition('.')[2].lower()}" if "." in name else ""
    if suffix not in (*_READERS, _PARQUET):
        raise DatasetError(
            f"unknown file type of {path}: expected {', '.join((*_READERS, _PARQUET))}, optionally with .gz. Convert "
            "or rename the file."
        )
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.name.endswith(".gz") else data
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DatasetError(
            f"cannot read {path} ({error}): expected UTF-8 text. Check path in [data], and the file."
        ) from error
    if suffix == _PARQUET:
        return Rows(tuple(Row(f"{path.name} row {n}", row) for n, row in enumerate(_parquet(data, path.name), 1)), ())
    text = _decoded(data, path.name)
    try:
        values = list(_READERS[suffix](text))
    except _WrongKind as error:
        raise DatasetError(f"{path} {error}") from None
    rows, faults = [], []
    for line, value in values:
        where = f"{path.name}:{line}"
        if isinstance(value, dict):
            rows.append(Row(where, value))
        else:
            faults.append(f"{where}: {value}")
    return Rows(tuple(rows), tuple(faults))


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a columnar file without nulls inside its columns: there, all objects have the same keys."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if item is not None}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return {column: strip(value) for column, value in row.items()}


class _WrongKind(Exception):
    """Raised by a reader for a whole file of another kind; says what it is and what to do."""


def _decoded(data: bytes, name: str) -> str:
    """Decode UTF-8. Raises DatasetError that names the likely encoding and how to convert from it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _not_utf8(name, "it begins as UTF-16 does", "UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in line {line}; Windows-1252 and Latin-1 are common"
        raise _not_utf8(name, found, "WINDOWS-1252") from error


def _not_utf8(name: str, found: str, encoding: str) -> DatasetError:
    return DatasetError(
        f"cannot read {name} ({found}): expected UTF-8 text. Convert it, for example with "
        f"`iconv -f {encoding} -t UTF-8 {name} > utf8-{name}`."
    )


def _parquet(data: bytes, name: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError as error:
        raise DatasetError(
            f'pyarrow is not installed: {name} needs it. Run `pip install "adapterhub[datasets]"`, or convert the file '
            "to JSONL."
        ) from error
    try:
        rows = parquet.read_table(BufferReader(data)).to_pylist()
    except (ArrowException, OSError) as error:
        raise DatasetError(f"cannot read {name} ({error}): expected a parquet file. Write it again.") from error
    return [without_nulls(row) for row in rows]


_Lines = Iterator[tuple[int, dict[str, Any] | str]]
"""Pairs of a line number and the row, or what is wrong with it."""


def _jsonl(text: str) -> _Lines:
    if text.lstrip().startswith("[") and _is_list_of_objects(text):
        raise _WrongKind("is one JSON list: expected a row on each line. Rename it to .json.")
    # Not splitlines: JSON strings may contain U+2028 and other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _object(line)


def _is_list_of_objects(text: str) -> bool:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(raw, list) and bool(raw) and all(isinstance(item, dict) for item in raw)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Raises ValueError for a key that it has twice, of which JSON keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def _object(line: str) -> dict[str, Any] | str:
    try:
        raw = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return raw if isinstance(raw, dict) else "not a JSON object"


def _json(text: str) -> _Lines:
    """Parse one object, or a list of objects one by one, so that each has its line."""
    decoder, place, line, end = json.JSONDecoder(object_pairs_hook=_once), _skip(text, 0), 1, 0
    is_list = text[place : place + 1] == "["
    place = _skip(text, place + 1) if is_list else place
    while place < len(text) and text[place] != "]":
        line, end = line + text.count("\n", end, place), place
        try:
            raw, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON ({error}; nothing after it is read)"
            return
        yield line, raw if isinstance(raw, dict) else "not a JSON object"
        place = _skip(text, place)
        if is_list and text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif not is_list:
            break
        elif text[place : place + 1] not in ("]", ""):
            yield (
                line + text.count("\n", end, place),
                "not JSON (expected a comma and the next object; nothing after it is read)",
            )
            return
    if is_list and place >= len(text):
        yield line, "not JSON (the list does not end)"
    elif (rest := _skip(text, place + is_list)) < len(text):
        if not is_list and text[rest] == "{":
            raise _WrongKind("has more than one JSON object: expected one list. Rename it to .jsonl.")
        yield line + text.count("\n", end, rest), "not JSON (unexpected text after the end)"


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _table(delimiters: str) -> Callable[[str], _Lines]:
    """Return a reader of tables: the first delimiter that the first line has separates the columns."""

    def read(text: str) -> _Lines:
        head = text.lstrip().partition("\n")[0]
        delimiter = next((one for one in delimiters if one in head), delimiters[0])
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
                    if twice := [name for name, times in Counter(header).items() if times > 1]:
                        yield line, f"the column {twice[0]!r} twice"
                        return
                elif len(cells) != len(header):
                    yield line, f"{len(cells)} columns, expected {len(header)} as in the first line"
                else:
                    yield line, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            yield before + 1, f"not a table ({error}; nothing after it is read)"

    return read


_CHATML_TURN = re.compile(r"<\|im_start\|>.*?<\|im_end\|>", re.DOTALL)


def _text(text: str) -> _Lines:
    """Split into paragraphs; split a ChatML file into conversations, at blank lines between turns."""
    text = text.replace("\r\n", "\n")
    line_at = _line_counter(text)
    if not _CHATML_TURN.search(text):
        for found in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text):
            yield line_at(found.start()), {"text": found.group().rstrip()}
        return
    begin = end = 0
    for turn in _CHATML_TURN.finditer(text):
        between = text[end : turn.start()]
        if end and between.strip() == "" and between.count("\n") > 1:
            yield line_at(begin), {"text": text[begin:end]}
            begin = turn.start()
        end = turn.end()
    yield line_at(_skip(text, begin)), {"text": text[begin:].strip()}


def _line_counter(text: str) -> Callable[[int], int]:
    """Return a function from places, none before the last one, to line numbers: each line is counted once."""
    line, counted = 1, 0

    def line_at(place: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, place), place
        return line

    return line_at


_READERS: dict[str, Callable[[str], _Lines]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table(",;\t"),  # spreadsheets write semicolons where the comma is the decimal sign
    ".tsv": _table("\t"),
    ".txt": _text,
}
_PARQUET = ".parquet"
