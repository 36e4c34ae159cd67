"""The verb for when something is wrong with the machine."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import AsJson

_FAILED = 1


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: each finding ok, warn or fail, with what to do. Ends with 1 where something fails, else 0."""
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
