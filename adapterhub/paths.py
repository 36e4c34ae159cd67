"""Where things are kept on this machine: one folder, moved by one variable."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from adapterhub.files import expanded

HOME_VARIABLE = "ADAPTERHUB_HOME"


def home() -> Path:
    """`$ADAPTERHUB_HOME`, else the platform's folder for user data. Not created here."""
    configured = os.environ.get(HOME_VARIABLE)
    if configured:
        return expanded(configured).absolute()
    return platformdirs.user_data_path("adapterhub")
