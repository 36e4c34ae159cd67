"""Small adapter packages made by hand, so that tests of files and digests need no model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from adapterhub import card
from adapterhub.files import sha256_of
from adapterhub.lora_config import read_lora_config
from adapterhub.manifest import BaseEntry, Chat, FileEntry, Manifest
from adapterhub.package import UNLISTED

FINGERPRINT = "fp1:" + "ab" * 32


def write_peft_folder(folder: Path, *, rank: int = 4, seed: int = 0, module: str = "q_proj", **config: object) -> Path:
    """A PEFT-like LoRA folder for one 64 -> 32 layer; of the tiny base `v_proj` is one."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": [module],
        "base_model_name_or_path": "x",
    }
    (folder / "adapter_config.json").write_text(json.dumps(raw | config))
    random = np.random.default_rng(seed)
    key = f"base_model.model.model.layers.0.self_attn.{module}"
    tensors = {
        f"{key}.lora_A.weight": random.normal(size=(rank, 64)).astype("float32"),
        f"{key}.lora_B.weight": random.normal(size=(32, rank)).astype("float32"),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_package(folder: Path, *, name: str = "small", base_id: str = "owner/base", seed: int = 0) -> Path:
    """A complete package, packed without a base or a probe."""
    write_peft_folder(folder, seed=seed)
    write_manifest(folder, name=name, base_id=base_id)
    return folder


def write_manifest(
    folder: Path, *, name: str = "small", base_id: str = "owner/base", fingerprint: str = FINGERPRINT
) -> None:
    listed = [path for path in sorted(folder.iterdir()) if path.name not in UNLISTED]
    manifest = Manifest(
        name=name,
        licence="apache-2.0",
        base=BaseEntry(id=base_id, fingerprint=fingerprint),
        lora=read_lora_config(folder).described(),
        chat=Chat(template_sha256=sha256_of(folder / "chat_template.jinja"), bos="<s>", eos="</s>", pad="</s>"),
        files={path.name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size) for path in listed},
    )
    (folder / "README.md").write_text(card.render(manifest))
    (folder / "adapterhub.json").write_text(manifest.to_json())
