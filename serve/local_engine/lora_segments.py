"""Group the rows of a batch by adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    def set(self, rows: Sequence[tuple[int, AdapterMix]], tables: dict[str, AdapterTable]) -> None:
        """Set the rows of the next forward; `tables` are the resident adapters', empty without kernels."""
        self.python = segments_of(rows)
        self.num_rows = sum(count for count, _ in rows)
        known = self.python if tables else []
        runs = [(one.start, one.end, [(tables[a.digest], a.scale) for a in one.mix]) for one in known]
        self.kernel = SegmentTable(runs, num_rows=self.num_rows)
