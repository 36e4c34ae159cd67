"""Check a base by its config and the headers of its files, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub.bases.capabilities import capability_of
from adapterhub.errors import BaseNotFound, BaseUnsupported, InvalidTensors
from adapterhub.package.safetensors_header import read_header

_INDEX = "model.safetensors.index.json"


def read_config(folder: Path) -> Any:
    """Return transformers' config of a base. No code of the base is run.

    Raises BaseNotFound for a config that cannot be read or contradicts itself, BaseUnsupported for a model that needs
    code of its own.
    """
    from transformers import AutoConfig

    raw = _read_object(folder / "config.json")
    _check_architecture(raw, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture checks its sizes in its own way, and divides by some of them
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else repr(error)
        raise BaseNotFound(
            f"{folder / 'config.json'} cannot be used: {reason}. Fetch or save the base again."
        ) from error
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise BaseUnsupported(
            f"{folder.name} cannot be trained or served: {config.model_type} has several models of text. Expected one "
            "causal language model, such as Llama or Qwen."
        ) from error
    _check_sizes(raw, text, folder)
    return config


def check_causal(config: Any, folder: Path) -> None:
    """Check that the base is a causal language model of transformers. Raises BaseUnsupported."""
    if reason := why_not_causal(config):
        raise BaseUnsupported(
            f"{folder.name} cannot be trained or served: {reason}. Expected a causal language model, such as Llama or "
            "Qwen."
        )


def why_not_causal(config: Any) -> str:
    """Return why a model is no causal language model that is trained or served here; empty where it is one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = capability_of(config)
    if found.train.mode == found.serve.mode == "refused":
        return found.serve.reason
    is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "" if is_causal else f"transformers has no causal language model for {config.model_type}"


def check_files(folder: Path) -> None:
    """Check that every weight file is there and whole, by the index and the headers. Raises BaseNotFound."""
    index = folder / _INDEX
    if index.is_file():
        places = _read_object(index).get("weight_map")
        if not isinstance(places, dict):
            raise BaseNotFound(f"{index} has no weight_map: expected names of weights and files. Fetch the base again.")
        shards = set(map(str, places.values()))
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise BaseNotFound(
                f"{folder} is half a download: {len(missing)} of {len(shards)} files are missing (first: {missing[0]}"
                "). Fetch the base again."
            )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except InvalidTensors as error:
            raise BaseNotFound(f"{folder} is half a download: {error}") from error


def check_vocabulary(config: Any, tokenizer: Any, folder: Path) -> None:
    """Check that the model has a row for every token of the tokenizer's own vocabulary. Raises BaseNotFound.

    Tokens that were added to a tokenizer may be more: some released bases add one for pictures that a model of text
    never gets.
    """
    rows = config.get_text_config().vocab_size
    if type(rows) is int and tokenizer.vocab_size > rows:
        raise BaseNotFound(
            f"{folder} contradicts itself: its tokenizer has {tokenizer.vocab_size} tokens, its model {rows}. Fetch or "
            "save both again, from one model."
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BaseNotFound(f"{path} cannot be read: {error}. Fetch or save the base again.") from error
    if not isinstance(found, dict):
        raise BaseNotFound(f"{path} is not a JSON object. Fetch or save the base again.")
    return found


def _check_architecture(raw: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model that only its own code computes; many have code of their own beside a class of transformers."""
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type")
    is_known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if "auto_map" in raw:
        named = raw.get("architectures") or []
        own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(kind), ()) if is_known else ()
        if not is_known or (own and named and own not in named):
            raise BaseUnsupported(
                f"{folder.name} needs code from its own repository ({', '.join(map(str, named)) or kind}), which is "
                f"never run here. Expected a model that transformers {__version__} computes itself: choose such a copy."
            )
    if not is_known:
        raise BaseNotFound(
            f"{folder / 'config.json'} has model_type {kind!r}, which transformers {__version__} does not know. "
            "Expected a config that transformers wrote: fetch or save the base again, or choose another."
        )


def _check_sizes(raw: Mapping[str, Any], text: Any, folder: Path) -> None:
    """Refuse sizes that cannot be those of one model; transformers checks them for a few architectures only."""
    given = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    hidden, heads, groups, head = (
        _size(text, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    named = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}
    faults = [f"{name} is {size}" for name, size in named.items() if size is not None and size < 1]
    if heads and not faults:
        # A head has hidden_size / heads numbers, unless the config or the architecture says otherwise.
        is_derived = not any(_size(text, name) for name in ("kv_lora_rank", "attention_head_size"))
        if hidden and is_derived and "head_dim" not in given and head in (None, hidden // heads) and hidden % heads:
            faults.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        if groups and "num_key_value_heads" in given and heads % groups:
            faults.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    if faults:
        raise BaseNotFound(
            f"{folder / 'config.json'} contradicts itself: {', '.join(faults)}. Fetch or save the base again."
        )


def _size(text: Any, name: str) -> int | None:
    """Return a size by transformers' own name for it; None where it is not one number for all layers."""
    found = vars(text).get(text.attribute_map.get(name, name))
    return found if type(found) is int else None
