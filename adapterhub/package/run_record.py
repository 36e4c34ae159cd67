"""The record of a training run beside its weights: recipe.toml, train_log.jsonl and report.html.

The trainer writes the log line by line; packing reads it. Each line is one JSON object, whose kind is its `event`:
`start` (base, quantization, digests, versions), `step` (loss, tokens), `measured` (held-out loss on the way), `sampled`
(answers to fixed prompts), `end` (totals, held-out losses, last answers).
"""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError

from adapterhub.adapter import BaseRef
from adapterhub.errors import InvalidManifest
from adapterhub.package.manifest import Evaluation, Quantization, Training
from adapterhub.strict import Strict, parse_json

LOG_NAME = "train_log.jsonl"
RECIPE_NAME = "recipe.toml"
REPORT_NAME = "report.html"
REPORT_HEAD = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
)
"""Start of every report. Its content security policy lets a browser run no script and fetch nothing."""


class RunStart(Strict):
    """The inputs of the run, logged before its first step."""

    event: Literal["start"] = "start"
    base_id: str
    base_revision: str | None
    base_fingerprint: str
    quantization: Quantization
    recipe_sha256: str
    data_sha256: str
    samples: int
    seed: int
    start_digest: str | None = None
    """Digest of the adapter that the run started from; None: a new one."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end an answer under the run's chat template, besides EOS."""
    date: str | None = None
    """Date (YYYY-MM-DD) that the chat template rendered; None: it does not read the clock."""
    versions: dict[str, str]


class RunStep(Strict):
    """One optimizer step."""

    event: Literal["step"] = "step"
    step: int
    loss: float
    """Loss of the method; in supervised fine-tuning in nats per trained token."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Number of tokens in the step's batch."""
    trained_tokens: int
    seconds: float


class RunMeasured(Strict):
    """The held-out loss after a step."""

    event: Literal["measured"] = "measured"
    step: int
    loss: float


class SampleAnswer(Strict):
    """A model's greedy answer to one of the fixed prompts."""

    prompt: str
    text: str


class RunSampled(Strict):
    """Answers after a step; after step 0 those of the bare base."""

    event: Literal["sampled"] = "sampled"
    step: int
    answers: list[SampleAnswer]


class RunEnd(Strict):
    """The totals and results of a complete run."""

    event: Literal["end"] = "end"
    steps: int
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    evaluations: list[Evaluation]
    answers: list[SampleAnswer] = Field(default_factory=list)
    """Answers of the adapter as it was written."""


RunEvent = RunStart | RunStep | RunMeasured | RunSampled | RunEnd
_EVENT: TypeAdapter[RunEvent] = TypeAdapter(RunEvent)


@dataclass(frozen=True)
class RunRecord:
    base: BaseRef
    quantization: Quantization
    training: Training
    evaluations: tuple[Evaluation, ...]
    steps: tuple[RunStep, ...]
    peak_memory_bytes: int
    stop: tuple[str, ...] = ()
    date: str | None = None
    """Date (YYYY-MM-DD) that the chat template rendered; None: it does not read the clock."""


def read_run_events(path: Path, *, is_whole: bool = True) -> list[RunEvent]:
    """Return the events of a log. During the run (`is_whole` false), an incomplete last line is left out.

    Raises InvalidManifest when the log is damaged.
    """
    try:
        # Not splitlines: texts in it may hold line ends that are none of JSONL's.
        *lines, rest = path.read_bytes().split(b"\n")
        if rest and is_whole:
            lines.append(rest)
        return [_EVENT.validate_python(parse_json(line)) for line in lines]
    except (ValueError, ValidationError) as error:
        raise InvalidManifest(f"{path} is not a training log ({error}): train again, or remove it.") from error


def starts_of_unfinished(folder: Path) -> set[str]:
    """Return the digests that unfinished runs in a server's training folder start from.

    A run is `RUN.toml`, and `RUN/` once it is complete.
    """
    starts: set[str] = set()
    for path in folder.glob("run-*.toml"):
        if not (path.with_suffix("") / LOG_NAME).is_file():
            with suppress(OSError, ValueError, RecursionError):  # one that cannot be read cannot be resumed
                starts.add(str(tomllib.loads(path.read_text(encoding="utf-8")).get("start")))
    return starts


def read_run_record(folder: Path) -> RunRecord | None:
    """Return the record of a finished run, None when there is no log (an adopted adapter).

    Raises InvalidManifest when the log is damaged, or of a run that did not finish.
    """
    path = folder / LOG_NAME
    if not path.is_file():
        return None
    events = read_run_events(path)
    start, end = events[0] if events else None, events[-1] if events else None
    if not isinstance(start, RunStart) or not isinstance(end, RunEnd):
        raise InvalidManifest(f"{path} is the log of a run that did not finish: train again into a new folder.")
    return RunRecord(
        base=BaseRef(start.base_id, start.base_revision, start.base_fingerprint),
        quantization=start.quantization,
        training=Training(
            recipe_sha256=start.recipe_sha256,
            data_sha256=start.data_sha256,
            samples=start.samples,
            steps=end.steps,
            trained_tokens=end.trained_tokens,
            seconds=end.seconds,
            seed=start.seed,
            versions=start.versions,
        ),
        evaluations=tuple(end.evaluations),
        steps=tuple(event for event in events if isinstance(event, RunStep)),
        peak_memory_bytes=end.peak_memory_bytes,
        stop=tuple(start.stop),
        date=start.date,
    )
