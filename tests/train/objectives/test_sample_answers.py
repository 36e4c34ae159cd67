"""Sample answers while training: plain greedy, so that they show the adapter and not the base's settings."""

from __future__ import annotations

from typing import Any

import pytest
from greedy_settings import GREEDY_SETTINGS, make_repeating_base
from transformers import GenerationConfig

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import LoadedBase, load_base
from adapterhub.probe import PROMPTS
from train.objectives.sample_answers import FixedPrompts


@pytest.fixture(scope="module")
def repeating(smollm2: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return load_base(make_repeating_base(tmp_path_factory.mktemp("base"), smollm2), dtype="float32")


@pytest.mark.parametrize("name", ["repetition_penalty", "suppress_tokens", "forced_eos_token_id", "num_beams"])
def test_generation_settings_of_the_base_do_not_change_sample_answers(repeating: LoadedBase, name: str) -> None:
    prompts = FixedPrompts(PROMPTS[:1], repeating.tokenizer)
    plain = prompts.answer(repeating.model)
    tokens = repeating.tokenizer(plain[0].text)["input_ids"]
    settings: dict[str, Any] = {"eos_token_id": 2, "pad_token_id": 2} | GREEDY_SETTINGS[name](tokens)
    configured = repeating.model.generation_config = GenerationConfig(**settings)
    assert prompts.answer(repeating.model) == plain
    assert repeating.model.generation_config is configured
