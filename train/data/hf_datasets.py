"""Read rows through the `datasets` library: data sets of a Hub, and local folders.

The only module that imports `datasets`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import httpx

from adapterhub.errors import DatasetError
from adapterhub.files import expanded
from adapterhub.strict import Strict
from train.data.formats import FormatName
from train.data.readers import Row, Rows, without_nulls
from train.recipe import DatasetsSource


class KnownDataset(Strict):
    """Hub repository and row format of a data set that is known by a short name."""

    hub: str
    format: FormatName
    subset: str | None = None
    file: str | None = None
    """File of the repository to read; None: the repository's default."""


def known_dataset(name: str) -> KnownDataset | None:
    """Return the data set known by this short name, or None."""
    return _known().get(name)


def read_dataset(data: DatasetsSource, *, folder: Path) -> Rows:
    """Read all rows of one split.

    A path that starts with `.`, `/` or `~` is a local folder, relative to `folder`. Raises DatasetError when the
    library is not installed, the Hub does not answer, or the data set or split does not exist.
    """
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(
            'the library `datasets` is not installed: source = "datasets" needs it. Run `pip install datasets`, or '
            'read files with source = "file".'
        ) from error
    datasets.disable_progress_bars()
    try:
        # All rows are read here: a damaged file or a missing decoder shows only then.
        return Rows(tuple(_rows(_load(datasets, data, folder), data.path)), ())
    except (ConnectionError, httpx.TransportError) as error:
        raise DatasetError(
            f"cannot fetch data set {data.path} ({_first_line(error)}): expected an answer from the Hub. Try again "
            'later, or use a local copy with path = "./FOLDER".'
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(
            f"cannot read data set {data.path} ({_first_line(error)}): expected subset {data.subset or 'default'}, "
            f"split {data.split}. Check path, subset and split in [data]."
        ) from error


def _load(datasets: Any, data: DatasetsSource, folder: Path) -> Any:
    if data.path.startswith((".", "/", "~")):
        place = folder / expanded(data.path)
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            return _split_of(datasets.load_from_disk(str(place)), data.split)
        if not place.is_dir():
            raise FileNotFoundError(f"{place} is not a folder")
        return datasets.load_dataset(str(place), data.subset, split=data.split)
    known = known_dataset(data.path)
    if known is None:
        return datasets.load_dataset(data.path, data.subset, split=data.split, revision=data.revision)
    return datasets.load_dataset(
        known.hub, data.subset or known.subset, split=data.split, revision=data.revision, data_files=known.file
    )


def _split_of(saved: Any, split: str) -> Any:
    """Return one split of a folder made by `save_to_disk`, which has one split or several by name."""
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise ValueError(f"it has the splits {', '.join(saved)}")
    return saved[split]


def _rows(found: Any, name: str) -> Iterator[Row]:
    for number, value in enumerate(found, start=1):
        yield Row(f"{name} row {number}", without_nulls(value))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


@cache
def _known() -> dict[str, KnownDataset]:
    table = tomllib.loads((package_files("train") / "known_datasets.toml").read_text(encoding="utf-8"))
    return {name: KnownDataset.model_validate(entry) for name, entry in table.items()}
