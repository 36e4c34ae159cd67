"""Patterns over module names agree with Python's own engine, which PEFT uses, and end whoever wrote them."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.package.module_patterns import check_ending, check_pattern, ends_with, matches

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|o_proj"
    r"|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn"
    r"|dense)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
PATTERNS = [
    UNSLOTH,
    r".*\.self_attn\.(q_proj|v_proj)",
    r"model\.layers\.[1-9]\d*\.mlp\.\w+",
    "q_proj",
    "^model.layers.1.self_attn.q_proj",
    r".*layers\.0\..*",
]
MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.language_model.layers.0.mlp.gate_proj",
    "lm_head",
    "model.embed_tokens",
    "q_proj",
]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_they_match_what_python_matches(pattern: str, module: str) -> None:
    assert matches(pattern, module) == bool(re.fullmatch(pattern, module))
    assert ends_with(pattern, module) == bool(re.match(rf"(.*\.)?({pattern})$", module))


@given(module=st.from_regex(r"[a-z_]{1,8}(\.([0-9]{1,2}|[a-z_]{1,8})){0,5}", fullmatch=True))
def test_unsloths_pattern_matches_what_python_matches(module: str) -> None:
    assert matches(UNSLOTH, module) == bool(re.fullmatch(UNSLOTH, module))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*b", "(a{1,9}){1,9}b", "a*a*a*a*a*a*b", ".?" * 490 + "!"])
def test_a_pattern_that_stops_pythons_engine_ends(pattern: str) -> None:
    assert not matches(pattern, "a" * 190 + "c")
    assert not ends_with(pattern, "a" * 190 + "c")


@pytest.mark.parametrize("pattern", ["[[:alpha:]_]+", "q{,2}_proj", "q(?i)_proj", "q_pr\u00f6j", r"\pL+", r"\Qq\E"])
def test_a_pattern_that_python_reads_otherwise_is_refused(pattern: str) -> None:
    for check in (check_pattern, check_ending):
        with pytest.raises(ValueError, match=r"^the pattern .* (another meaning|not a regular expression of Python)"):
            check(pattern)


def test_a_pattern_is_checked_where_peft_puts_it() -> None:
    assert check_pattern("(?i)Q_proj") == "(?i)Q_proj"
    with pytest.raises(ValueError, match="not a regular expression of Python"):
        check_ending("(?i)Q_proj")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["(" * 4000 + "a" + ")" * 4000, "(?:a?){999}" * 900, "(?i)" + "[\x00-\x7f]" * 2000])
def test_checking_a_pattern_ends(text: str) -> None:
    with contextlib.suppress(ValueError):
        check_pattern(text)
