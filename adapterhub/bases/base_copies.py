"""Copies of the base's own weights in an adapter file, which PEFT saves beside LoRA on an embedding or a head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub.adapter import StoredBase
from adapterhub.errors import AdapterUnsupported
from adapterhub.files import write_stream_atomic
from adapterhub.package.lora_config import WEIGHTS_NAME, LoraConfig
from adapterhub.package.safetensors_header import read_header

_PREFIX, _LAYER, _WEIGHT = "base_model.model.", ".base_layer", ".weight"
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")


def drop_base_copies(folder: Path, config: LoraConfig, base: StoredBase) -> list[str]:
    """Remove the weights that are the base's, in the file's dtype, from the adapter file; return their names.

    Loads torch where there are any. Raises AdapterUnsupported for one that differs from the base's: it was trained, and
    the config does not say so.
    """
    path = folder / WEIGHTS_NAME
    copies = {key: _module(key) for key in read_header(path) if _is_copy(key, config)}
    if not copies:
        return []
    from safetensors.torch import load_file, save

    tensors = load_file(path)
    for key, module in copies.items():
        if not any(_equal(tensors[key], weight) for weight in _weights(base.path, module)):
            raise AdapterUnsupported(
                f"{path} has the whole weight of {module}, and it is not the base's: expected low-rank updates, or "
                "the module in modules_to_save. Save an untrained one with save_embedding_layers=False."
            )
    with write_stream_atomic(path) as file:
        file.write(save({key: tensor for key, tensor in tensors.items() if key not in copies}, {"format": "pt"}))
    return sorted(copies)


def _module(key: str) -> str:
    return key.removeprefix(_PREFIX).removesuffix(_WEIGHT).removesuffix(_LAYER)


def _is_copy(key: str, config: LoraConfig) -> bool:
    """Return whether a tensor is the weight of an embedding or a head that modules_to_save does not name."""
    if not (key.startswith(_PREFIX) and key.endswith(_WEIGHT)) or ".lora_" in key:
        return False
    module = _module(key)
    name = module.rpartition(".")[2]
    is_vocabulary = name in _EMBEDDINGS or name in ("lm_head", "embed_out", "output")
    return is_vocabulary and not any(module == saved or module.endswith(f".{saved}") for saved in config.saved_modules)


def _equal(found: Any, weight: Any) -> bool:
    return found.shape == weight.shape and bool((found == weight.to(found.dtype)).all())


def _weights(folder: Path, module: str) -> Iterator[Any]:
    """Yield the base's weight of the module; of a head that is tied, the embedding's."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = dict(json.loads(index.read_bytes())["weight_map"])
    else:
        places = dict.fromkeys(read_header(folder / "model.safetensors"), "model.safetensors")
    own = f"{module}{_WEIGHT}"
    tied = [name for name in places if name.removesuffix(_WEIGHT).rpartition(".")[2] in _EMBEDDINGS]
    for name in [own] if own in places else tied:
        with safe_open(folder / places[name], framework="pt") as file:
            yield file.get_tensor(name)
