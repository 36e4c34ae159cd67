"""The only check of an adapter against a base: whose it is, its layers, their shapes, its depth and vocabulary.

It reads the header of the adapter's weights and the config of the base; neither's weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.checks import check_causal, read_config
from adapterhub.chat_template import encode_chat
from adapterhub.errors import AdapterNoEffect, AdapterUnsupported, IncompatibleBase, MissingFile
from adapterhub.package.layout import read_lora
from adapterhub.package.lora_config import LoraConfig, LoraTensor
from adapterhub.package.own_template import tokenizer_config

Shapes = dict[str, tuple[int, int]]
"""Module -> (in, out) of a linear layer, (vocabulary, width) of an embedding."""

_NUMBER = re.compile(r"\.(\d+)\.")


def module_shapes(base: StoredBase) -> Shapes:
    """Return the shape of every linear layer and embedding of the base, from its config alone. Loads torch."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = read_config(base.path)
    check_causal(config, base.path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layers, whose weight is [in, out]
            shapes[name] = (module.nx, module.nf)
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
    return shapes


def check_base(adapter: Adapter, base: StoredBase) -> None:
    """Check that the adapter was made for exactly this base. Raises IncompatibleBase, showing both."""
    if adapter.manifest.base.fingerprint != base.ref.fingerprint:
        raise IncompatibleBase(
            f"adapter {adapter.manifest.name} was made for {adapter.base}, but this base is {base.ref}: "
            "use the base it was trained on, or train it again on this one."
        )


def check_adapter(adapter: Adapter, base: StoredBase) -> None:
    """Check a package against a stored base: `check_base`, then `check_compatible`. Loads torch.

    The outline of a base has no fingerprint; then its layers decide. Raises AdapterNoEffect, IncompatibleBase.
    """
    if base.ref.fingerprint is not None:
        check_base(adapter, base)
    config, tensors = read_lora(adapter.path)
    check_compatible(adapter.manifest.name, config, tensors, module_shapes(base))


def check_compatible(name: str, config: LoraConfig, tensors: Iterable[LoraTensor], shapes: Shapes) -> None:
    """Check that every tensor has the shape of a layer of the base, and that every layer the config targets has one.

    So the base may be neither shallower nor deeper than the one the adapter was made for.

    Raises:
        AdapterNoEffect: no tensor belongs to any layer of the base.
        IncompatibleBase: a layer is missing on either side, or has another shape.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.module, {})[tensor.kind] = tensor.info.shape
    unexpected = sorted(module for module in parts if module not in shapes)
    if len(unexpected) == len(parts):
        raise AdapterNoEffect(
            f"no tensor of adapter {name} belongs to a layer of this base (first: {unexpected[0]}): it was made for "
            "another architecture."
        )
    if experts := [module for module in unexpected if ".experts." in module]:
        raise IncompatibleBase(
            f"adapter {name} adapts {len(experts)} layers of single experts (first: {experts[0]}): this base keeps the "
            "weights of all experts in one tensor. Train attention and the other linear layers."
        )
    if unexpected:
        raise IncompatibleBase(
            f"adapter {name} has tensors for {len(unexpected)} layers this base does not have (first: "
            f"{unexpected[0]}): it was made for a deeper or different model."
        )
    for module, found in parts.items():
        adapted, expected = _shape(found), shapes[module]
        # A head's and an embedding's whole weights are [vocabulary, width]; of a linear layer that is [out, in].
        if adapted != expected and not ("weight" in found and adapted == expected[::-1]):
            raise IncompatibleBase(
                f"adapter {name} expects {module} to be {' -> '.join(map(str, adapted))}, this base has "
                f"{expected[0]} -> {expected[1]}."
            )
    aimed = () if config.is_all_linear else sorted(filter(config.aims_at, shapes))
    bare = [module for module in aimed if module not in parts]
    if not bare and config.is_everywhere:
        bare = _deeper_ones(set(parts), shapes)
    if bare:
        raise IncompatibleBase(
            f"adapter {name} leaves out {len(bare)} layers of this base of the kind it adapts (first: {bare[0]}): "
            "it was made for a shallower model."
        )


def check_vocabulary(name: str, tensors: Iterable[LoraTensor], shapes: Shapes, *, has_tokenizer: bool) -> None:
    """Check that an adapter made with another vocabulary has its tokenizer beside it. Raises MissingFile."""
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


def check_tokenizer(name: str, folder: Path, tokenizer: Any, template: str) -> None:
    """Check that the adapter's own tokenizer, if it has one, makes its prompts of the tokens of the base's.

    Servers encode with `tokenizer`, the base's, and render with its special tokens. Tokens that were added and that no
    prompt has (a padding token) do not matter. Raises AdapterUnsupported with the first token that differs.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from transformers import PreTrainedTokenizerFast

    special = {key: value for key, value in tokenizer_config(folder).items() if key in _SPECIAL and value is not None}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in special.items()}
    try:
        own = PreTrainedTokenizerFast(tokenizer_file=str(path), **texts)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise AdapterUnsupported(
            f"{path} is no tokenizer ({str(error)[:200]}): expected the tokenizers library's JSON. Save it again."
        ) from error
    for messages in _EXCHANGES:
        for theirs, ours in zip_longest(*(_encoded(one, messages, template) for one in (own, tokenizer))):
            if theirs != ours:
                raise AdapterUnsupported(
                    f"the tokenizer of adapter {name} writes its prompts with other tokens than the base's (first: "
                    f"{_named(own, theirs)}, where the base has {_named(tokenizer, ours)}): expected the same, since "
                    "prompts are encoded with the base's. Train on a base whose tokenizer has these tokens."
                )


_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_EXCHANGES = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Two + 2?"}, {"role": "assistant", "content": "4: an easy one."}],
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hello, it's me!"}],
)


def _encoded(tokenizer: Any, messages: list[dict[str, str]], template: str) -> list[int]:
    """Return the tokens of a conversation; none where the template refuses it."""
    is_prompt = messages[-1]["role"] == "user"
    try:
        return encode_chat(tokenizer, messages, template=template, add_generation_prompt=is_prompt)
    except Exception:  # a template is a program, and may fail in any way; the probe reports one that refuses all
        return []


def _named(tokenizer: Any, token: int | None) -> str:
    return "no token" if token is None else f"{tokenizer.convert_ids_to_tokens(token)!r}, id {token}"


def _shape(found: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if "weight" in found:
        return found["weight"]
    first, second = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in found else ("lora_A", "lora_B")
    return (found[first][1], found[second][0])


def _deeper_ones(adapted: set[str], shapes: Shapes) -> list[str]:
    """Return the layers of the base behind the last adapted block, when every block before it is adapted.

    PEFT lists full layer names when there are few, so the targets alone cannot distinguish all layers of a shallow
    model from some layers of a deep one; a selection rarely is the first blocks.
    """
    kinds = {_NUMBER.sub(".#.", module) for module in adapted}
    alike = {module for module in shapes if _NUMBER.sub(".#.", module) in kinds and _NUMBER.search(module)}
    blocks = {int(_NUMBER.findall(module)[0]) for module in adapted & alike}
    last = max(blocks, default=0)
    before = {module for module in alike if int(_NUMBER.findall(module)[0]) <= last}
    return sorted(alike - adapted) if last and before == adapted & alike else []
