"""What clients of the API read, without a server."""

from __future__ import annotations

import pytest
from openai.types import Model

from serve.client import ServedModel


@pytest.mark.parametrize("field", ["license", "licence"])
def test_license_of_a_served_adapter_under_its_new_and_its_old_name(field: str) -> None:
    card = {"id": "captain", "object": "model", "created": 1, "owned_by": "tests", "parent": "base", field: "mit"}
    assert ServedModel.read(Model.model_validate(card)).license == "mit"
