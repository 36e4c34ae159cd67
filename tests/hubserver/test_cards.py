"""Metadata and tags from a README.md and an adapter_config.json."""

from __future__ import annotations

import json

import pytest

from adapterhub.hubserver.errors import InvalidCard
from adapterhub.hubserver.storage.cards import facts_of, parse_card

CARD = b"""---
base_model: org/base
library_name: peft
pipeline_tag: text-generation
license: apache-2.0
language: [en, de]
datasets: [org/data]
tags: [lora, peft, 7]
---
# Poems
"""


def test_card_gives_tags() -> None:
    facts = facts_of(card_bytes=CARD, config_bytes=b"{}", has_safetensors=True)
    assert facts.tags == (
        "peft",
        "safetensors",
        "lora",
        "text-generation",
        "en",
        "de",
        "dataset:org/data",
        "license:apache-2.0",
        "base_model:org/base",
        "base_model:adapter:org/base",
    )
    assert (facts.library_name, facts.relation) == ("peft", "adapter")


def test_adapter_config_stands_in_for_a_missing_card() -> None:
    config = b'{"base_model_name_or_path": "org/base", "peft_type": "LORA"}'
    facts = facts_of(card_bytes=None, config_bytes=config, has_safetensors=False)
    assert facts.tags == ("peft", "base_model:org/base", "base_model:adapter:org/base")


@pytest.mark.parametrize("base", ["/home/ana/base", "../base", "base", 7, None])
def test_base_that_is_no_repository_is_no_tag(base: object) -> None:
    config = json.dumps({"base_model_name_or_path": base}).encode()
    assert facts_of(card_bytes=None, config_bytes=config, has_safetensors=False).base_models == ()


@pytest.mark.parametrize("text", ["", "# only words", "---\n---\n", "---\nnever closed: yes\n", "--- \n\n---"])
def test_card_without_head_says_nothing(text: str) -> None:
    assert parse_card(text) == {}


def test_dates_become_text() -> None:
    assert parse_card("---\ndate: 2026-01-02\n---\n") == {"date": "2026-01-02"}


@pytest.mark.parametrize(
    "head",
    [
        "a: [",
        "- a\n- b",
        "just text",
        "a: &x [1]\nb: *x",
        "score: .nan",
        "? [a, b]\n: c",
        "a: !!python/object:os.system {}",
        "a: " + "[" * 5000,
        "a: " + "x" * 70_000,
    ],
    ids=["open", "list", "text", "alias", "nan", "key", "object", "deep", "long"],
)
def test_unreadable_head_is_refused(head: str) -> None:
    with pytest.raises(InvalidCard) as refusal:
        parse_card(f"---\n{head}\n---\n")
    assert "the YAML header" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_unreadable_files_give_no_tags() -> None:
    facts = facts_of(card_bytes=b"---\na: [\n---\n", config_bytes=b"\xff{", has_safetensors=False)
    assert facts.tags == ("peft",)
