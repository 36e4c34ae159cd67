"""Does an adapter fit a base, layer by layer? Told by the header of one and the config of the other alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapterhub.adapter import StoredBase
from adapterhub.errors import AdapterNoEffect, IncompatibleBase, MissingFile
from adapterhub.package.lora_config import LoraConfig, LoraTensor

Shapes = dict[str, tuple[int, int]]
"""module -> (in, out) of a linear layer, (vocabulary, width) of an embedding"""


_NUMBER = re.compile(r"\.(\d+)\.")


def module_shapes(base: StoredBase) -> Shapes:
    """Of every linear layer and embedding of the base, from its config alone. Loads torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
    return shapes


def check_compatible(name: str, config: LoraConfig, tensors: Iterable[LoraTensor], shapes: Shapes) -> None:
    """Every tensor belongs to a layer of the base and has its shape, and no layer the config aims at was left out.

    Depth counts in both directions. Raises AdapterNoEffect, IncompatibleBase.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.module, {})[tensor.kind] = tensor.info.shape
    strangers = sorted(module for module in parts if module not in shapes)
    if len(strangers) == len(parts):
        raise AdapterNoEffect(f"no tensor of adapter {name} belongs to a layer of this base (first: {strangers[0]}).")
    if strangers:
        raise IncompatibleBase(
            f"adapter {name} has tensors for {len(strangers)} layers this base does not have (first: {strangers[0]}): "
            "it was made for a deeper or different model."
        )
    for module, found in parts.items():
        adapted, expected = _shape(found), shapes[module]
        # A head's and an embedding's whole weights are [vocabulary, width]; of a linear layer that is [out, in].
        if adapted != expected and not ("weight" in found and adapted == expected[::-1]):
            raise IncompatibleBase(
                f"adapter {name} expects {module} to be {' -> '.join(map(str, adapted))}, this base has "
                f"{expected[0]} -> {expected[1]}."
            )
    bare = [module for module in sorted(shapes) if module not in parts and _is_aimed_at(module, config)]
    bare = bare or _deeper_ones(set(parts), shapes)
    if bare and config.is_everywhere:
        raise IncompatibleBase(
            f"adapter {name} leaves out {len(bare)} layers of this base of the kind it adapts (first: {bare[0]}): "
            "it was made for a shallower model."
        )


def check_vocabulary(name: str, tensors: Iterable[LoraTensor], shapes: Shapes, *, has_tokenizer: bool) -> None:
    """Raises MissingFile for an adapter made with another vocabulary that does not bring its tokenizer along."""
    for tensor in tensors:
        is_matrix = tensor.kind == "weight" and len(tensor.info.shape) == 2
        if is_matrix and tensor.module in shapes and not has_tokenizer:
            rows, known = tensor.info.shape[0], max(shapes[tensor.module])
            is_vocabulary = tensor.module.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "embed_in")
            if is_vocabulary and rows != known:
                raise MissingFile(
                    f"adapter {name} was made with a vocabulary of {rows:,} tokens, the base has {known:,}, and no "
                    "tokenizer.json says which they are: save the tokenizer beside the adapter."
                )


def _shape(found: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if "weight" in found:
        return found["weight"]
    first, second = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in found else ("lora_A", "lora_B")
    return (found[first][1], found[second][0])


def _deeper_ones(adapted: set[str], shapes: Shapes) -> list[str]:
    """Layers of the base behind the last adapted block, when every block before it is adapted.

    PEFT names each layer in full when there are few, so that targets alone do not tell all layers of a shallow model
    from some of a deep one; who picks some seldom picks the first.
    """
    kinds = {_NUMBER.sub(".#.", module) for module in adapted}
    alike = {module for module in shapes if _NUMBER.sub(".#.", module) in kinds and _NUMBER.search(module)}
    blocks = {int(_NUMBER.findall(module)[0]) for module in adapted & alike}
    last = max(blocks, default=0)
    before = {module for module in alike if int(_NUMBER.findall(module)[0]) <= last}
    return sorted(alike - adapted) if last and before == adapted & alike else []


def _is_aimed_at(module: str, config: LoraConfig) -> bool:
    """PEFT's rule: a list names ends of module names, a text is a regular expression for all of it."""
    if config.is_pattern:
        return re.fullmatch(config.targets[0], module) is not None
    return any(module == target or module.endswith(f".{target}") for target in config.targets)
