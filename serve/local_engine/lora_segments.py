"""Group the rows of a batch by adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterhub.errors import AdapterUnsupported
from serve.local_engine.cpu.structs import AdapterTable, SegmentTable
from serve.local_engine.scheduler import AdapterMix


@dataclass(frozen=True)
class LoraSegment:
    """Consecutive rows of the batch, start to end, with the same adapter mix."""

    start: int
    end: int
    mix: AdapterMix


def segments_of(rows: Sequence[tuple[int, AdapterMix]]) -> list[LoraSegment]:
    """Group rows with the same adapters, from (number of rows, mix); rows of the bare base have no segment."""
    segments: list[LoraSegment] = []
    row = 0
    for count, mix in rows:
        if mix and segments and segments[-1].mix == mix and segments[-1].end == row:
            segments[-1] = LoraSegment(segments[-1].start, row + count, mix)
        elif mix and count:
            segments.append(LoraSegment(row, row + count, mix))
        row += count
    return segments


class Segments:
    """The current batch's segments for one kind of layer, in Python and as the kernels' structs."""

    def __init__(self) -> None:
        self.python: list[LoraSegment] = []
        self.kernel = SegmentTable()
        self.num_rows = 0
        self._of_one: tuple[AdapterMix, dict[str, AdapterTable]] | None = None
        """Mix and tables of the only sequence, whose layers may be called on any number of rows."""

    def set(self, rows: Sequence[tuple[int, AdapterMix]], tables: dict[str, AdapterTable]) -> None:
        """Set the rows of the next forward; `tables` are the resident adapters', empty without kernels."""
        self._of_one = None
        self._set(rows, tables)

    def set_one(self, mix: AdapterMix, tables: dict[str, AdapterTable]) -> None:
        """Set one mix for all rows of the next forward, however many a layer is called on."""
        self._of_one = (mix, tables)
        self._set([(1, mix)], tables)

    def fit(self, num_rows: int) -> None:
        """Adjust to the rows that a layer is called on.

        Raises AdapterUnsupported where they are other rows than the batch's, as in an expert that gets some of them.
        """
        if num_rows == self.num_rows:
            return
        if self._of_one is None:
            raise AdapterUnsupported(
                f"a layer of this base is called on {num_rows} rows of a batch of {self.num_rows}: expected all of "
                "them. Such a base is served one sequence at a time."
            )
        mix, tables = self._of_one
        self._set([(num_rows, mix)], tables)

    def _set(self, rows: Sequence[tuple[int, AdapterMix]], tables: dict[str, AdapterTable]) -> None:
        self.python = segments_of(rows)
        self.num_rows = sum(count for count, _ in rows)
        known = self.python if tables else []
        runs = [(one.start, one.end, [(tables[a.digest], a.scale) for a in one.mix]) for one in known]
        self.kernel = SegmentTable(runs, num_rows=self.num_rows)
