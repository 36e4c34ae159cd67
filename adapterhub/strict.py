"""The pydantic base class of what is read from disk and from requests."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A record that refuses fields it does not declare, and that does not change once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
