"""Export the feedback that a recipe learns from, and write a recipe that reads the export.

The feedback store may grow during a run; the export does not change, so the run can be resumed and repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cli.options import say
from adapterhub.cli.serving.feedback import open_store

if TYPE_CHECKING:
    from train.recipe import FeedbackData, Recipe


@contextmanager
def feedback_exported(
    recipe: Recipe, path: Path, output: Path, *, is_plan: bool = False
) -> Iterator[tuple[Recipe, Path]]:
    """Yield (recipe, its file) to train with: those given, unless the recipe learns from feedback.

    For feedback, write OUTPUT.jsonl with the export and OUTPUT.toml with the recipe, which reads it; for a plan, in a
    temporary folder. A stopped run uses its own again. OUTPUT.toml keeps the comments and the order of `path`. Raises
    UsageError when there is no feedback, or none that the recipe can learn from.
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
            _export(recipe, recipe.data, path, place)
        yield read_recipe(written), written


def _export(recipe: Recipe, data: FeedbackData, path: Path, place: Path) -> None:
    from adapterhub.errors import UsageError
    from adapterhub.feedback.export import export_rows, to_jsonl
    from adapterhub.feedback.store import ExportFormat
    from adapterhub.files import expanded, write_atomic

    method = recipe.preference.method if recipe.preference else None
    unit = "answers" if method is None else "labeled replies" if method == "kto" else "preference pairs"
    form: ExportFormat = "sft" if method is None else "kto" if method == "kto" else "dpo"
    store = recipe.folder / expanded(data.path) if data.path else None
    lines = export_rows((given for _, given in open_store(store).rows()), form)
    if not lines:
        raise UsageError(
            f"the feedback store has no {unit} yet: expected votes with a winner, or corrections. Collect some first."
        )
    say(f"exported {len(lines)} {unit} from feedback")
    write_atomic(place.with_name(f"{place.name}.jsonl"), to_jsonl(lines))
    source = path.read_text(encoding="utf-8") if path.is_file() else recipe.to_toml()
    text = _reading_file(source, recipe, f"{place.name}.jsonl")
    write_atomic(place.with_name(f"{place.name}.toml"), text)


def _reading_file(text: str, recipe: Recipe, name: str) -> str:
    """Return the recipe's TOML with the file `name` as its data, and with paths that hold in any folder."""
    import tomlkit

    from adapterhub.adapter import AdapterRef
    from adapterhub.files import expanded

    document: Any = tomlkit.parse(text)
    document["data"].update({"source": "file", "path": name})
    template = recipe.data.template
    if template and template.endswith(".jinja"):
        document["data"]["template"] = str((recipe.folder / expanded(template)).absolute())
    folder = AdapterRef.parse(recipe.start).folder if recipe.start else None
    if folder is not None:
        document["start"] = str((recipe.folder / expanded(folder)).absolute())
    return tomlkit.dumps(document)
