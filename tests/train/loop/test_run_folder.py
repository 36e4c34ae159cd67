"""A run's folder after a power cut, and on a disk that is full."""

from __future__ import annotations

from pathlib import Path

import torch
from disk_operations import recorded
from safetensors.torch import load_file, save_file
from training import make_recipe

from train.loop.run_folder import RunFolder, State


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
