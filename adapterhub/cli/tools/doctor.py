"""The command `doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from adapterhub.cli.options import AsJson

_FAILED = 1


def doctor(as_json: AsJson = False) -> None:
    """Check this machine and suggest fixes.

    Each finding is ok, warn or fail. The exit code is 1 if a check fails, else 0.
    """
    from adapterhub.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            typer.echo(f"{finding.status:<5} {finding.check:<11} {finding.found}")
            if finding.fix:
                typer.echo(f"{'':<17} -> {finding.fix}")
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(_FAILED)
