from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from packages import write_manifest, write_package, write_peft_folder
from peft import PeftModel
from tiny_models import make_peft_adapter
from transformers import AutoModelForCausalLM

from adapterhub.adapter import StoredBase
from adapterhub.package.diff import difference
from adapterhub.package.layout import open_adapter
from adapterhub.package.manifest import Evaluation


def test_two_of_the_same_differ_in_nothing(tmp_path: Path) -> None:
    one, two = (open_adapter(write_package(tmp_path / name)) for name in "ab")
    found = difference(one, two)
    assert (found.config, found.provenance, found.metrics) == ((), (), ())
    assert [layer.distance for layer in found.layers] == [0]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_norms_and_distances_are_those_of_pefts_own_updates(
    tmp_path: Path, tiny_base: StoredBase, options: dict[str, bool]
) -> None:
    folders = []
    for seed, rank in ((1, 4), (2, 8)):
        folder = tmp_path / str(seed)
        make_peft_adapter(folder, tiny_base, rank=rank, seed=seed, **options)
        (folder / "README.md").unlink()
        (folder / "chat_template.jinja").write_text("")
        write_manifest(folder)
        folders.append(folder)
    found = difference(open_adapter(folders[0]), open_adapter(folders[1]))

    deltas = []
    for folder in folders:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base.path), str(folder))
        layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
        deltas.append({name: m.get_delta_weight("default").detach().numpy() for name, m in layers.items()})
    assert {layer.module for layer in found.layers} == set(deltas[0])
    for layer in found.layers:
        ours, theirs = deltas[0][layer.module], deltas[1][layer.module]
        assert layer.norm_before == pytest.approx(np.linalg.norm(ours), rel=1e-5)
        assert layer.norm_after == pytest.approx(np.linalg.norm(theirs), rel=1e-5)
        assert layer.distance == pytest.approx(np.linalg.norm(ours - theirs), rel=1e-5)


def test_a_layer_only_one_adapts_has_one_norm(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    one = write_package(tmp_path / "a")
    two = write_peft_folder(tmp_path / "b")
    tensors = load_file(two / "adapter_model.safetensors")
    renamed = {key.replace("layers.0", "layers.1"): tensor for key, tensor in tensors.items()}
    save_file({**tensors, **renamed}, two / "adapter_model.safetensors")
    write_manifest(two)
    layers = difference(open_adapter(one), open_adapter(two)).layers
    assert [(layer.norm_before is None, layer.distance) for layer in layers] == [(False, 0), (True, None)]


def test_config_base_and_losses_are_shown_with_both_values(tmp_path: Path) -> None:
    one = open_adapter(write_package(tmp_path / "a"))
    folder = write_package(tmp_path / "b", base_id="owner/other")
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": 16})
    )
    write_manifest(folder, base_id="owner/other")
    raw = json.loads((folder / "adapterhub.json").read_text())
    evaluation = Evaluation(data="trivia", tokens=10, base_loss=2.0, adapter_loss=1.0)
    (folder / "adapterhub.json").write_text(json.dumps(raw | {"evaluations": [evaluation.model_dump()]}))
    found = difference(one, open_adapter(folder))
    assert ("alpha", "8", "16") in [(c.fact, c.before, c.after) for c in found.config]
    assert ("base.id", "owner/base", "owner/other") in [(c.fact, c.before, c.after) for c in found.provenance]
    assert ("trivia: adapter_loss", None, "1") in [(c.fact, c.before, c.after) for c in found.metrics]
    assert found.layers[0].norm_after == pytest.approx(2 * (found.layers[0].norm_before or 0))
