"""Train from a recipe given by name, file or object: what `adapterhub.train` is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.adapter import Adapter, AdapterRef, StoredBase
from adapterhub.bases.store import stored_base
from adapterhub.files import expanded
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry
from train import trainer
from train.recipe import Recipe, find_recipe, read_recipe

if TYPE_CHECKING:
    from adapterhub.package.run_record import RunEnd
    from train.loop.progress import Progress
    from train.loop.run_folder import Listener


def train(
    recipe: Recipe | Path | str,
    *,
    base: StoredBase | Path | str | None = None,
    output: Path | str | None = None,
    registry: Registry | None = None,
    progress: Progress | None = None,
    listen: Listener | None = None,
) -> RunEnd:
    """Train the adapter that a recipe describes and return the run's last record: losses, steps, seconds, peak memory.

    `recipe` is a shipped recipe's name, a TOML file, or a `Recipe`. `base` replaces the recipe's own base. The adapter
    is written to `output`, by default a folder named after the recipe; a recipe with `start` resolves it in `registry`.
    `progress` shows the run on stderr when not given; `listen` is called with each event of the run's record.

    Raises what `train.trainer` raises: OutputNotFresh, RecipeError, DatasetError, BaseNotFound, IncompatibleBase,
    UsageError, StorageFull, TrainingStopped, TrainingFailed; AdapterNotFound for a `start` that nothing resolves.
    """
    given = recipe if isinstance(recipe, Recipe) else read_recipe(find_recipe(str(recipe)))
    if base is None:
        stored = stored_base(given.base)
    else:
        stored = stored_base(base)
        # Recorded with the run, so that it can be resumed and packed on the base it was trained on.
        named = base if isinstance(base, str) else str(stored.path.resolve())
        folder, given = given.folder, given.model_copy(update={"base": named})
        given._folder = folder
    start = start_of(given, (registry or Registry()).open)
    folder = expanded(output if output is not None else given.name)
    return trainer.train(given, stored, folder, start=start, progress=progress, listen=listen)


def start_of(recipe: Recipe, open_ref: Callable[[str], Adapter]) -> Adapter | None:
    """Return the adapter that the recipe starts from, None for a new one.

    A folder is relative to the recipe; any other reference is given to `open_ref`, and raises what that raises.
    """
    if recipe.start is None:
        return None
    folder = AdapterRef.parse(recipe.start).folder
    if folder is not None:
        return open_adapter(recipe.folder / expanded(folder))
    return open_ref(recipe.start)
