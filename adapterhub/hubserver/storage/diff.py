"""Git diffs of untrusted text, at a cost that is linear in its size: files, bytes and aligned lines are bounded."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from adapterhub.hubserver.storage.commit import RepoFile

MAX_FILES = 300
"""Largest number of files that a diff shows; of the others it tells the number."""
MAX_FILE_BYTES = 1 << 20
"""Largest file that a diff shows, in bytes; of a larger file it tells that it differs."""
MAX_BYTES = 2 << 20
"""How much text a diff reads, in bytes; of the files after that it tells that they differ."""
_MAX_ALIGNED = 500
"""Largest number of changed lines of a file, on each side, that are aligned with each other (at most 0.03 s)."""
_MAX_ALIGNED_TOTAL = 10 * _MAX_ALIGNED


@dataclass(frozen=True)
class FileChange:
    """A file before and after; None: it does not exist."""

    path: str
    old: RepoFile | None
    new: RepoFile | None


def git_diff(changes: Iterable[FileChange], data: Callable[[RepoFile], bytes]) -> str:
    """Return the changes as a git diff; `data` returns the bytes of a file."""
    return "".join(_Differ(data).parts(changes))


class _Differ:
    def __init__(self, data: Callable[[RepoFile], bytes]) -> None:
        self._data = data
        self._left_bytes = MAX_BYTES
        self._left_lines = _MAX_ALIGNED_TOTAL

    def parts(self, changes: Iterable[FileChange]) -> Iterator[str]:
        left_out = 0
        for number, change in enumerate(changes):
            if number < MAX_FILES:
                yield from self._file(change)
            else:
                left_out += 1
        if left_out:
            yield f"# {left_out} more files differ, which are not shown\n"

    def _file(self, change: FileChange) -> Iterator[str]:
        yield f"diff --git a/{change.path} b/{change.path}\n"
        before, after = self._lines(change.old), self._lines(change.new)
        if before is None or after is None:
            yield "Binary files differ\n"
            return
        opcodes = self._opcodes(before, after)
        matcher = difflib.SequenceMatcher(None, "", "")
        matcher.opcodes = opcodes  # type: ignore[attr-defined]  # difflib's name for what it has computed
        yield f"--- {'/dev/null' if change.old is None else f'a/{change.path}'}\n"
        yield f"+++ {'/dev/null' if change.new is None else f'b/{change.path}'}\n"
        for hunk in matcher.get_grouped_opcodes():
            yield f"@@ -{_range(hunk[0][1], hunk[-1][2])} +{_range(hunk[0][3], hunk[-1][4])} @@\n"
            for tag, start, end, new_start, new_end in hunk:
                if tag == "equal":
                    yield from (f" {line}\n" for line in before[start:end])
                else:
                    yield from (f"-{line}\n" for line in before[start:end])
                    yield from (f"+{line}\n" for line in after[new_start:new_end])

    def _lines(self, entry: RepoFile | None) -> list[str] | None:
        """Return the lines of a file, or None if it is too large or not text."""
        if entry is None:
            return []
        if entry.sha256 is None:
            if entry.size > min(MAX_FILE_BYTES, self._left_bytes):
                return None
            self._left_bytes -= entry.size
        try:
            return self._data(entry).decode().splitlines()
        except UnicodeDecodeError:
            return None

    def _opcodes(self, before: list[str], after: list[str]) -> list[tuple[str, int, int, int, int]]:
        """Return difflib's opcodes. What does not fit the bound is one replacement, which is a valid diff, too."""
        shorter = min(len(before), len(after))
        start = next((at for at in range(shorter) if before[at] != after[at]), shorter)
        same = next((at for at in range(shorter - start) if before[-1 - at] != after[-1 - at]), shorter - start)
        old, new = before[start : len(before) - same], after[start : len(after) - same]
        middle = [("replace", 0, len(old), 0, len(new))] if old or new else []
        if max(len(old), len(new)) <= min(_MAX_ALIGNED, self._left_lines):
            self._left_lines -= max(len(old), len(new))
            middle = list(difflib.SequenceMatcher(None, old, new).get_opcodes())
        opcodes = [(tag, a + start, b + start, c + start, d + start) for tag, a, b, c, d in middle]
        first = [("equal", 0, start, 0, start)] if start else []
        last = [("equal", len(before) - same, len(before), len(after) - same, len(after))] if same else []
        return [*first, *opcodes, *last]


def _range(start: int, end: int) -> str:
    """Return a range of lines as unified diffs write it."""
    length = end - start
    first = start + 1 if length else start
    return f"{first}" if length == 1 else f"{first},{length}"
