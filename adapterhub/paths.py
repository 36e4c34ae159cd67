"""The folder in which everything is kept, and the variable that sets it."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from adapterhub.files import expanded

HOME_VARIABLE = "ADAPTERHUB_HOME"


def home() -> Path:
    """Return `$ADAPTERHUB_HOME`, else the platform's folder for user data. The folder may not exist."""
    configured = os.environ.get(HOME_VARIABLE)
    if configured:
        return expanded(configured).absolute()
    return platformdirs.user_data_path("adapterhub")
