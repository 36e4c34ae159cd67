"""The table of vLLM's limits: in the code, in the documentation, and in what the planner of a training run says."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.errors import UsageError
from adapterhub.package.lora_config import LoraConfig
from serve.engine import AdapterScale, GenerationRequest
from serve.vllm_engine import compat
from train.planning.plan import VLLM_RANKS, servable
from train.recipe import LoraSection

ROOT = Path(__file__).parents[3]
PLAIN = LoraConfig(
    rank=8, alpha=16.0, use_rslora=False, use_dora=False, targets=("q_proj",), rank_pattern={}, alpha_pattern={}
)


def _documented(limit: compat.Limit) -> tuple[str, str, str]:
    return limit.subject, limit.feature, re.sub(r"{(\w+)}", lambda found: found[1].upper(), limit.message)


def test_the_documentation_has_the_same_table() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text()
    rows = re.findall(r"^\| (adapter|request|setting|server) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert rows == [_documented(limit) for limit in compat.LIMITS]


def test_every_limit_stands_in_the_table() -> None:
    assert set(compat.LIMITS) == {one for one in vars(compat).values() if isinstance(one, compat.Limit)}


def test_only_the_table_words_a_limit() -> None:
    words = [re.sub(r"{\w+}", "", part).strip() for one in compat.LIMITS for part in re.split(r"{\w+}", one.message)]
    phrases = {phrase for phrase in words if len(phrase) > 12}
    assert len(phrases) >= len(compat.LIMITS) - 1
    for path in [*(ROOT / "serve" / "vllm_engine").glob("*.py"), ROOT / "serve" / "engine_choice.py"]:
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        text = "\n".join(str(value) for value in constants)
        assert path.name == "compat.py" or not {phrase for phrase in phrases if phrase in text}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PLAIN, None),
        (replace(PLAIN, use_rslora=True), None),
        (replace(PLAIN, rank=512), None),
        (replace(PLAIN, use_dora=True), "uses DoRA, which vLLM does not serve"),
        (
            replace(PLAIN, saved_modules=("embed_tokens", "lm_head")),
            "has full weights of embed_tokens, lm_head (modules_to_save), which vLLM does not serve",
        ),
        (replace(PLAIN, rank=513), "has rank 513, vLLM takes at most 512"),
        (replace(PLAIN, rank_pattern={"q_proj": 600}), "has rank 600, vLLM takes at most 512"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve_is_refused_with_the_reason(config: LoraConfig, said: str | None) -> None:
    assert compat._reason(config) == said


@pytest.mark.parametrize(
    ("adapters", "is_refused"),
    [
        ((), False),
        ((AdapterScale("sha256:a"),), False),
        ((AdapterScale("sha256:a", 0.5),), True),
        ((AdapterScale("sha256:a"), AdapterScale("sha256:b")), True),
    ],
)
def test_a_mix_and_a_scale_are_refused(adapters: tuple[AdapterScale, ...], is_refused: bool) -> None:
    request = GenerationRequest("r", (1,), adapters=adapters)
    if not is_refused:
        compat.check_request(request)
        return
    with pytest.raises(UsageError, match="one adapter at its own scale"):
        compat.check_request(request)


def test_the_nearest_rank_vllm_takes() -> None:
    assert [compat.allowed_rank(rank) for rank in (1, 2, 8, 24, 300)] == [1, 8, 8, 32, 320]
    with pytest.raises(UsageError, match="--max-lora-rank 513: expected at most 512"):
        compat.allowed_rank(513)


def test_the_planner_of_a_training_run_says_the_same() -> None:
    """`train` imports nothing of `serve`: its copy of the limits is compared here."""
    assert VLLM_RANKS == compat.RANKS
    for lora, config in (
        (LoraSection(rank=8), PLAIN),
        (LoraSection(method="dora"), replace(PLAIN, use_dora=True)),
        (LoraSection(rank=600), replace(PLAIN, rank=600)),
    ):
        (vllm,) = [one for one in servable(lora) if one.engine == "vllm"]
        assert vllm.can_serve == (compat._reason(config) is None)
