"""The recipe of a candidate: whatever the names are, it is TOML that a run reads."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterhub.feedback.improvement import Improvement
from train.recipe import FeedbackData, Recipe

ADAPTER: Any = SimpleNamespace(manifest=SimpleNamespace(name="captain"), digest="sha256:" + "c" * 64)


@pytest.mark.parametrize("name", ["captain", 'a "quoted" name', "back\\slash", "⚓ Kapitän 🏴", "two\nlines"])
def test_names_and_paths_are_written_as_they_are(name: str) -> None:
    text = Improvement().recipe(ADAPTER, base="tiny", names=[name, name], store=Path("/") / name)
    data = Recipe.model_validate(tomllib.loads(text)).data
    assert isinstance(data, FeedbackData)
    assert (data.path, data.adapters) == (f"/{name}", (name, ADAPTER.digest))


def test_all_feedback_counts_where_that_is_asked_for() -> None:
    improvement = Improvement(all_adapters=True)
    assert improvement.about(ADAPTER, ["captain"]) is None
    data = Recipe.model_validate(tomllib.loads(improvement.recipe(ADAPTER, base="tiny", names=["captain"]))).data
    assert isinstance(data, FeedbackData)
    assert data.adapters == "all"
