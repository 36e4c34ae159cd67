"""Entry point of the command `adapterhub`: environment, signals, and errors as one line with an exit code.

Data goes to stdout, notes and errors to stderr. `adapterhub.cli` is the only package that imports all three packages.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

import typer
import typer.main

from adapterhub.cli.app import app
from adapterhub.cli.options import say
from adapterhub.errors import AdapterHubError, TrainingStopped, UsageError
from adapterhub.extras import extra_for

_INTERRUPTED = 130
"""Exit status after SIGINT, as shells report it."""


def main() -> None:
    """Run the command; print an expected error as one line and exit with its code."""
    # Hugging Face libraries read these once, when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would fill a log
    # Read when torch loads. Idle compute threads spin for some tens of microseconds, then sleep: endless spinning slows
    # other processes down, and sleeping at once made decoding 1.4 to 2.5 times slower on two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    # `kill` cleans up like Ctrl+C: temporary folders are removed. Servers and training runs install their own handlers.
    signal.signal(signal.SIGTERM, _interrupt_once)
    try:
        app(prog_name="adapterhub")
    except AdapterHubError as error:
        if isinstance(error, TrainingStopped):
            # It has stopped: a late signal must not break off the interpreter's cleaning up.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        command = _command(sys.argv[1:])
        extra = extra_for(error.name or "", command=command)
        if extra is None:
            raise
        called = " ".join(("adapterhub", *command))
        _fail(f"'{called}' needs the {extra} extra: pip install 'adapterhub[{extra}]'", UsageError.exit_code)
    except OSError as error:
        if os.environ.get("ADAPTERHUB_DEBUG"):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; set ADAPTERHUB_DEBUG=1 for a traceback.", 1)
    except SystemExit as error:
        if error.code == _INTERRUPTED:
            say("adapterhub: interrupted; complete files are kept.")
        raise


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Interrupt the command as Ctrl+C does. A second signal of this kind must not interrupt its cleaning up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _command(arguments: Sequence[str]) -> list[str]:
    """Return the words that name the command: those before its first argument or option."""
    words: list[str] = []
    here: object = typer.main.get_command(app)
    for word in arguments:
        here = getattr(here, "commands", {}).get(word)
        if here is None:
            break
        words.append(word)
    return words


def _fail(message: str, code: int) -> None:
    typer.echo(f"adapterhub: {message}", err=True)
    sys.exit(code)
