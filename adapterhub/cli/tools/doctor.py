"""The command `doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from adapterhub.cli.options import AsJson, show, show_json

_FAILED = 1


def doctor(as_json: AsJson = False) -> None:
    """Check this machine and suggest fixes.

    Each finding is ok, warn or fail. The exit code is 1 if a check fails, else 0.
    """
    from adapterhub.doctor import examine

    findings = examine()
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            show(f"{finding.status:<5} {finding.check:<11} {finding.found}")
            if finding.fix:
                show(f"{'':<17} -> {finding.fix}")
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(_FAILED)
