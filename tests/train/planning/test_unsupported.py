"""Every method on every kind of base, in one process and in several: trained, or refused by name before it begins."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from training import make_recipe, run

from adapterhub.adapter import StoredBase
from adapterhub.bases.store import find_base
from adapterhub.errors import RecipeError, UsageError
from train.distributed.launch import Launch, environment
from train.distributed.world import Shards
from train.planning.unsupported import check_distributed
from train.recipe import Recipe, read_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora": {"method": "rslora"}},
    "dora": {"lora": {"method": "dora"}},
    "pissa": {"lora": {"init": "pissa"}},
    "loftq": {"lora": {"init": "loftq"}},
    "eva": {"lora": {"init": "eva"}},
    "dora, pissa": {"lora": {"method": "dora", "init": "pissa"}},
    "embeddings": {"lora": {"targets": ["all-linear", "embeddings", "head"]}},
    "lora+": {"train": {"lora_plus_ratio": 16.0}},
    "neftune": {"train": {"neftune_alpha": 5.0}},
    "checkpointing": {"train": {"activation_checkpointing": True}},
    "8 bit": {"train": {"optimizer": "adamw-8bit"}},
    "paged": {"train": {"optimizer": "paged-adamw-8bit"}},
    "answers": {"train": {"sample_every": 1, "prompts": ["Hi?", "Who are you?"]}},
    "head": {"method": "head"},
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
    "prefix, checkpointing": {"method": "prefix", "train": {"activation_checkpointing": True}},
    "full": {"method": "full"},
    "full, checkpointing": {"method": "full", "train": {"activation_checkpointing": True}},
    "full, 8 bit": {"method": "full", "train": {"optimizer": "adamw-8bit"}},
}
KINDS = ("nf4", "fp4", "int8", "none")
DTYPES = ("float32", "bfloat16", "float16")
WORLDS: dict[str, Shards | None] = {"several": None, "sharded": "device", "offloaded": "host"}


def is_refused(method: str, kind: str, world: str = "one") -> bool:
    """Return what docs/training.md says."""
    is_dora, is_full, is_sharded = "dora" in method, method.startswith("full"), world in ("sharded", "offloaded")
    return (
        (is_dora and kind == "int8")
        or (method == "loftq" and kind not in ("nf4", "fp4"))
        or method == "prefix, checkpointing"
        or (is_full and kind != "none")
        or (is_sharded and (is_full or kind == "int8"))
    )


def recipe_of(folder: Path, method: str, kind: str, dtype: str) -> Recipe:
    """Write and read a recipe of one step. Raises RecipeError."""
    folder.mkdir()
    sections = {key: value for key, value in METHODS[method].items() if key != "method"}
    train = {"steps": 1, "checkpoint_every": 1} | sections.pop("train", {})
    file = folder / "mine.toml"
    make_recipe(folder, lines=6, train=train)  # the data, and a recipe to change
    text = file.read_text()
    text = text.replace('compute_dtype = "float32"', f'compute_dtype = "{dtype}"\nkind = "{kind}"')
    before, _, after = text.partition("[lora]\nrank = 4\ndropout = 0.1\n")
    if "method" in METHODS[method]:
        text = f'method = "{METHODS[method]["method"]}"\nvirtual_tokens = 4\n{before}{after}'
    else:
        lora = "".join(f"{key} = {value!r}\n" for key, value in sections.get("lora", {}).items())
        text = f"{before}[lora]\nrank = 4\n{lora}{after}"
    file.write_text(text)
    return read_recipe(file)


def combinations() -> Iterator[tuple[str, str, str]]:
    return itertools.product(METHODS, KINDS, DTYPES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_is_refused_by_name_or_planned(tmp_path: Path, kind: str) -> None:
    for number, method in enumerate(METHODS):
        if is_refused(method, kind):
            with pytest.raises(RecipeError, match="kind|activation_checkpointing"):
                recipe_of(tmp_path / str(number), method, kind, "float32")
            continue
        recipe = recipe_of(tmp_path / str(number), method, kind, "float32")
        for world, shards in WORLDS.items():
            refused = pytest.raises(UsageError, match=r"--shard") if is_refused(method, kind, world) else nullcontext()
            with refused:
                check_distributed(recipe, shards=shards)


def test_dora_on_a_row_of_zeros_is_refused_before_the_first_step(tmp_path: Path, tiny_base: StoredBase) -> None:
    """The tiny base's padding token has one: DoRA would divide 0 by 0."""
    recipe = make_recipe(tmp_path, lora={"method": "dora", "targets": ["head"]})
    with pytest.raises(RecipeError, match=r"1 of 4096 rows of .*lm_head are 0. Leave embeddings and head out"):
        run(recipe, tiny_base, tmp_path / "out")


needs_soak = pytest.mark.skipif("ADAPTERHUB_SOAK_S" not in os.environ, reason="minutes: run make soak")


@needs_soak
def test_what_is_not_refused_is_trained(tmp_path: Path, tiny_base: StoredBase) -> None:
    train_all(tmp_path, tiny_base, "one")


@needs_soak
@pytest.mark.parametrize("world", WORLDS)
def test_what_is_not_refused_is_trained_by_two_processes(tmp_path: Path, tiny_base: StoredBase, world: str) -> None:
    arguments = ["--nproc-per-node", "2", "--local-addr", "127.0.0.1", __file__, str(tmp_path), str(tiny_base.path)]
    paths = [str(Path(__file__).parents[2] / "fixtures"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, world],
        env=os.environ | environment(Launch(2), {}) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def train_all(folder: Path, base: StoredBase, world: str) -> None:
    """Train one step of each combination that is not refused."""
    for number, (method, kind, dtype) in enumerate(combinations()):
        if is_refused(method, kind, world) or (world != "one" and dtype == "float16"):
            continue
        print(method, kind, dtype, flush=True)
        recipe = recipe_of(folder / str(number), method, kind, dtype)
        assert run(recipe, base, folder / f"out-{number}").steps == 1


if __name__ == "__main__":
    from adapterhub.adapter import BaseName
    from train.distributed.world import process_group

    place, stored, named = sys.argv[1:]
    with process_group(shards=WORLDS[named]) as joined:
        own = Path(place) / str(joined.rank)
        own.mkdir()
        train_all(own, find_base(BaseName.parse(stored)), named)
