"""Terminal input and output: multi-line input, its history, and text without control characters."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

from adapterhub.errors import printable
from adapterhub.paths import home

HISTORY_FILE = "chat_history"
"""File of typed lines in ADAPTERHUB_HOME, readable by its owner only."""
HISTORY_LINES = 1000
"""Lines kept in the history, at most."""
BLOCK = '"""'
"""Mark at the start and end of a message of several lines."""

# An adapter may be anybody's work: its answers must not move the cursor, set the title or fill the clipboard.
# Bidi embeddings, overrides and isolates would show text in another order than it has.
_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {code: None for code in (*range(32), *range(127, 160), *_BIDI) if chr(code) not in "\n\t"}


def say(line: str) -> None:
    """Print a note to stderr, apart from the answers."""
    print(printable(line), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Print a delta of an answer to stdout."""
    print(text.translate(_CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


def read_any_bytes() -> None:
    """Accept piped input in any encoding: invalid bytes become a replacement character."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def read(prompt: str) -> str | None:
    """Return the next input: a line, or all lines between two marks; None at the end of the input."""
    line = _read_line(prompt)
    if line is None or not line.lstrip().startswith(BLOCK):
        return line
    opened = line.lstrip().removeprefix(BLOCK)
    if opened.rstrip().endswith(BLOCK):
        return opened.rstrip().removesuffix(BLOCK)
    block = [opened] if opened.strip() else []
    while (line := _read_line("... ")) is not None:
        if line.rstrip().endswith(BLOCK):
            last = line.rstrip().removesuffix(BLOCK)
            return "\n".join([*block, *([last] if last.strip() else [])])
        block.append(line)
    return "\n".join(block)


def _read_line(prompt: str) -> str | None:
    while True:
        try:
            return input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                say("")
            return None
        except KeyboardInterrupt:
            say("")  # the line is dropped, as in a shell


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Enable line editing with the history of earlier chats, on a terminal with readline."""
    try:
        import readline
    except ImportError:  # Windows
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    path = home() / HISTORY_FILE
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        # A history that cannot be written ends no chat.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
