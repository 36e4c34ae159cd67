"""A run's folder after a power cut, and on a disk that is full."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from disk_operations import recorded
from safetensors.torch import load_file, save_file
from training import make_recipe

from adapterhub.errors import RunNotResumable
from adapterhub.package.run_record import LOG_NAME
from train.loop.run_folder import RunFolder, State, kept_on_disk, read_run


def _write(folder: Path) -> None:
    save_file({"x": torch.ones(4)}, folder / "adapter_model.safetensors")


def test_a_checkpoint_is_on_disk_before_the_older_one_is_removed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with RunFolder.create(output, make_recipe(tmp_path), start=None) as run, recorded(run.path) as recording:
        for step in (1, 2, 3):
            run.save(State(step=step), _write)
            recording.acknowledge(str(step))
        recording.check_order()
        for acknowledged, found in recording.crashes(tmp_path / "after", draws=2):
            whole = [path for path in sorted(found.glob("step-*")) if (path / "state.json").is_file()]
            assert whole or not acknowledged
            newest = int(whole[-1].name.removeprefix("step-")) if whole else 0
            assert newest >= int((acknowledged or ["0"])[-1])
            for path in whole[-1:]:
                assert load_file(path / "adapter_model.safetensors")["x"].tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ["out", "out[1]", "*"])
def test_only_this_runs_leftovers_are_removed(tmp_path: Path, name: str) -> None:
    """Another run beside it, and a server's record of this one, may be written at this moment."""
    recipe = make_recipe(tmp_path)
    own, others = tmp_path / f".{name}.12ab34cd.tmp", [f".{name}.v2.12ab34cd.tmp", f".{name}.json.12ab34cd.tmp", ".x.12ab34cd.tmp"]  # fmt: skip  # noqa: E501
    for folder in (own, *(tmp_path / other for other in others)):
        folder.mkdir()
    with RunFolder.create(tmp_path / name, recipe, start=None):
        assert not own.exists()
        assert all((tmp_path / other).is_dir() for other in others)


def test_a_folder_that_was_half_removed_is_no_run_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path / "out", make_recipe(tmp_path), start=None) as run:
        run.save(State(step=1), _write)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOG_NAME).touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # killed before the first file went
    run.remove()
    with pytest.raises(RunNotResumable, match="is complete"):
        read_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("nothing", "no checkpoint was written. Start the run again."),
        ("a checkpoint", "a checkpoint of step 3 is kept. Resume it."),
        ("the adapter", "is complete in {}. It needs no other run."),
    ],
)
def test_what_an_ended_run_left_comes_with_what_to_do(tmp_path: Path, kept: str, said: str) -> None:
    if kept != "nothing":
        with RunFolder.create(tmp_path / "out", make_recipe(tmp_path), start=None) as run:
            run.save(State(step=3), _write)
    if kept == "the adapter":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / LOG_NAME).touch()
    assert kept_on_disk(tmp_path / "out", resume="Resume it.").endswith(said.format(tmp_path / "out"))
