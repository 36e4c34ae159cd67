"""Export the feedback that a recipe learns from, and write a recipe that reads the export.

The feedback store may grow during a run; the export does not change, so a stopped run can be resumed. Both files are in
the run's own folder, where no file of a person is, and are removed with it: feedback stays in the store alone, where
those who sent it can delete it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cli.options import registry, say
from adapterhub.cli.serving.feedback import open_store

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter
    from train.recipe import FeedbackData, Recipe


@contextmanager
def feedback_exported(
    recipe: Recipe, path: Path, output: Path, *, start: Adapter | None = None, is_plan: bool = False
) -> Iterator[tuple[Recipe, Path]]:
    """Yield (recipe, its file) to train with: those given, unless the recipe learns from feedback.

    For feedback, write the export and the recipe that reads it to OUTPUT.run; for a plan, to a temporary folder. A
    stopped run uses its own again. The written recipe keeps the comments and the order of `path`. `start` is the
    adapter that the recipe's `start` names.

    Raises UsageError when there is no feedback, or none that the recipe can learn from, and OutputNotFresh when OUTPUT
    or OUTPUT.run holds other files than a run's.
    """
    from train.loop.run_folder import FEEDBACK_RECIPE_NAME, prepared_folder, remove_unstarted
    from train.recipe import FeedbackData, read_recipe

    if not isinstance(recipe.data, FeedbackData):
        yield recipe, path
        return
    if is_plan:
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as scratch:
            written = _export(recipe, recipe.data, path, Path(scratch), start)
            yield read_recipe(written), written
        return
    output = output.absolute()
    with prepared_folder(output) as folder:
        written = folder / FEEDBACK_RECIPE_NAME
        if not any(folder.glob("step-*")):
            _export(recipe, recipe.data, path, folder, start)
    try:
        yield read_recipe(written), written
    finally:
        remove_unstarted(output)


def _export(recipe: Recipe, data: FeedbackData, path: Path, folder: Path, start: Adapter | None) -> Path:
    """Write the export and the recipe that reads it; return the recipe's path."""
    from adapterhub.feedback.export import to_jsonl, training_export
    from adapterhub.files import expanded, write_atomic
    from train.loop.run_folder import FEEDBACK_NAME, FEEDBACK_RECIPE_NAME

    method = recipe.preference.method if recipe.preference else None
    store = recipe.folder / expanded(data.path) if data.path else None
    found = training_export(open_store(store).rows(), method, about=_about(data, recipe, start))
    say(f"exported {len(found.lines)} lines of training data from feedback")
    for note in found.notes:
        say(f"note: {note}")
    write_atomic(folder / FEEDBACK_NAME, to_jsonl(found.lines))
    source = path.read_text(encoding="utf-8") if path.is_file() else recipe.to_toml()
    write_atomic(folder / FEEDBACK_RECIPE_NAME, _reading_file(source, recipe))
    return folder / FEEDBACK_RECIPE_NAME


def _about(data: FeedbackData, recipe: Recipe, start: Adapter | None) -> list[str] | None:
    """Return the names and digests of the adapters whose feedback counts; None: all feedback."""
    from adapterhub.adapter import AdapterRef
    from adapterhub.feedback.promotion import names_of

    if data.adapters is not None:
        return None if data.adapters == "all" else list(data.adapters)
    if start is None or recipe.start is None:
        return None
    named = AdapterRef.parse(recipe.start).name
    return [*([named] if named else []), *names_of(registry(), start), start.digest]


def _reading_file(text: str, recipe: Recipe) -> str:
    """Return the recipe's TOML with the export as its data, and with paths that hold in any folder."""
    import tomlkit

    from adapterhub.adapter import AdapterRef
    from adapterhub.files import expanded
    from train.loop.run_folder import FEEDBACK_NAME

    document: Any = tomlkit.parse(text)
    document["data"].pop("adapters", None)
    # A row that this run's chat template cannot render is counted and left out: nobody here can correct it.
    document["data"].update({"source": "file", "path": FEEDBACK_NAME, "on_fault": "skip"})
    if recipe.preference is None:
        document["train"]["loss_on"] = "last"  # the conversation before the judged answer may hold disliked ones
    template = recipe.data.template
    if template and template.endswith(".jinja"):
        document["data"]["template"] = str((recipe.folder / expanded(template)).absolute())
    folder = AdapterRef.parse(recipe.start).folder if recipe.start else None
    if folder is not None:
        document["start"] = str((recipe.folder / expanded(folder)).absolute())
    return tomlkit.dumps(document)
