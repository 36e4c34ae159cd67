"""Recipes that learn from feedback: what a server collected becomes a file, and the recipe one that reads it.

The store goes on growing while a run trains; the file does not, so the run can be resumed and repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.cli.options import say
from adapterhub.cli.serving.feedback import open_store

if TYPE_CHECKING:
    from train.recipe import FeedbackData, Recipe


@contextmanager
def feedback_exported(
    recipe: Recipe, path: Path, output: Path, *, is_plan: bool = False
) -> Iterator[tuple[Recipe, Path]]:
    """(recipe, its file) to train with: those given, unless they learn from feedback. Then OUTPUT.toml, which reads
    OUTPUT.jsonl, both written here; for a plan in a folder that is gone afterwards.

    A stopped run's are used again. Raises UsageError when no feedback was kept, or none of the kind that is learnt.
    """
    from train.loop.run_folder import run_path
    from train.recipe import FeedbackData, read_recipe

    if not isinstance(recipe.data, FeedbackData):
        yield recipe, path
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as scratch:
        place = (Path(scratch) if is_plan else output.absolute().parent) / output.name
        written = place.with_name(f"{place.name}.toml")
        if is_plan or not (run_path(output).is_dir() and written.is_file()):
            _export(recipe, recipe.data, place)
        yield read_recipe(written), written


def _export(recipe: Recipe, data: FeedbackData, place: Path) -> None:
    from adapterhub.errors import UsageError
    from adapterhub.feedback.export import export_rows, to_jsonl
    from adapterhub.feedback.store import ExportFormat
    from adapterhub.files import expanded, write_atomic

    method = recipe.preference.method if recipe.preference else None
    form: ExportFormat = "sft" if method is None else "kto" if method == "kto" else "dpo"
    store = recipe.folder / expanded(data.path) if data.path else None
    lines = export_rows((given for _, given in open_store(store).rows()), form)
    if not lines:
        wanted = "to learn" if method is None else "to compare"
        raise UsageError(f"the feedback holds nothing {wanted} yet: votes with a winner and corrections do.")
    say(f"{len(lines)} {'answers' if method is None else 'comparisons'} from feedback")
    write_atomic(place.with_name(f"{place.name}.jsonl"), to_jsonl(lines))
    write_atomic(place.with_name(f"{place.name}.toml"), _reading(recipe, data, f"{place.name}.jsonl").to_toml())


def _reading(recipe: Recipe, data: FeedbackData, name: str) -> Recipe:
    """The recipe over the file `name`; its other paths no longer start at the folder it lay in."""
    from adapterhub.adapter import AdapterRef
    from adapterhub.files import expanded
    from train.recipe import FileData

    kept = data.model_dump(exclude={"source", "path"})
    if data.template and data.template.endswith(".jinja"):
        kept["template"] = str((recipe.folder / expanded(data.template)).absolute())
    changed: dict[str, object] = {"data": FileData(source="file", path=name, **kept)}
    folder = AdapterRef.parse(recipe.start).folder if recipe.start else None
    if folder is not None:
        changed["start"] = str((recipe.folder / expanded(folder)).absolute())
    return recipe.model_copy(update=changed)
