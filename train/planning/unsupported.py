"""Combinations of a recipe with several processes that cannot be trained, refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

from adapterhub.errors import UsageError
from train.distributed.world import Shards
from train.recipe import Recipe

_RULES: tuple[tuple[Callable[[Recipe, Shards | None], bool], str], ...] = (
    (
        lambda recipe, shards: recipe.preference is not None,
        "the recipe has a [preference] section: preference tuning runs in one process. Leave --launch out.",
    ),
    (
        lambda recipe, shards: recipe.method == "full" and shards is not None,
        "method = full has no frozen weights: --shard divides frozen weights only. Leave --shard out.",
    ),
    (
        lambda recipe, shards: recipe.quantization.kind == "int8" and shards is not None,
        "kind = int8 keeps constants beside its weights, which --shard does not divide: expected nf4, fp4 or none. "
        "Change kind in [quantization], or leave --shard out.",
    ),
)
"""(whether the combination is refused, why and what to do). What one process refuses is refused in train/recipe.py."""


def check_distributed(recipe: Recipe, *, shards: Shards | None) -> None:
    """Check that several processes can train the recipe, with the base sharded as `shards` says. Raises UsageError."""
    for is_refused, reason in _RULES:
        if is_refused(recipe, shards):
            raise UsageError(reason)
