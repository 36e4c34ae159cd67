"""The command `adapterhub`. Imports happen inside the verbs, so that help and lists start at once.

Data goes to stdout, everything said about it to stderr. The only package that may see all three packages.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings

import typer

# Importing registers the commands, in the order `--help` lists them.
# isort: off
import adapterhub.cli.training.train
import adapterhub.cli.training.recipes
import adapterhub.cli.training.memory
import adapterhub.cli.registry.package
import adapterhub.cli.registry.registry
import adapterhub.cli.hub.hub
import adapterhub.cli.serving.serve
import adapterhub.cli.serving.chat
import adapterhub.cli.serving.feedback
import adapterhub.cli.training.improve
import adapterhub.cli.serving.ratings
import adapterhub.cli.registry.base
import adapterhub.cli.hub.hubserver
import adapterhub.cli.tools.doctor  # noqa: F401

# isort: on
from adapterhub.cli.app import app
from adapterhub.cli.examples import show_examples
from adapterhub.cli.options import say
from adapterhub.errors import AdapterHubError

show_examples(app)

_INTERRUPTED = 130
"""exit status after SIGINT, as shells count it"""


def main() -> None:
    """Entry point: every error raised on purpose becomes one line and its exit code."""
    # Set before any Hugging Face import, which reads them once.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars, which would fill a log
    # Read when torch loads. Idle compute threads spin for some tens of microseconds, then sleep: spinning on ruins
    # other processes on the machine, sleeping at once made decoding 1.4 to 2.5 times slower on two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    # `kill` cleans up as Ctrl-C does: temporary folders go, servers that handle it themselves override this.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="adapterhub")
    except AdapterHubError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if os.environ.get("ADAPTERHUB_DEBUG"):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; ADAPTERHUB_DEBUG=1 shows where it came from.", 1)
    except SystemExit as error:
        if error.code == _INTERRUPTED:
            say("adapterhub: interrupted; everything that was complete is kept.")
        raise


def _fail(message: str, code: int) -> None:
    typer.echo(f"adapterhub: {message}", err=True)
    sys.exit(code)
