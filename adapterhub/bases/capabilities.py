"""Which bases we train and serve as transformers computes them, and how: the only list of it.

The plan, the trainer, `pack` and both engines ask `capability_of`. It is a positive list: what is not on it is trained
one sample a row and served one sequence at a time, by the model's own forward pass and cache, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["batched", "single", "refused"]
"""How a base is computed: many samples or sequences in one forward pass; one at a time; not at all."""


@dataclass(frozen=True)
class Support:
    """How a base is trained or served, and why not better."""

    mode: Mode
    reason: str = ""
    longest: int | None = None
    """Length of the longest sample that may share a forward pass with others, in tokens; None: any."""
    limit: int | None = None
    """Length of the longest sample that is computed right at all, in tokens; None: any."""


@dataclass(frozen=True)
class Capability:
    """What we do with one base, known from its config before weights are read."""

    train: Support
    serve: Support


BATCHED = frozenset(
    {
        "afmoe", "apertus", "arcee", "aria_text", "beam", "biogpt", "bitnet", "cohere", "cohere2", "cohere2_moe",
        "cohere_compass_text", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "emu3_text_model", "ernie4_5",
        "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
        "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe",
        "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
        "internlm3", "iquestcoder", "jais2", "laguna", "llama", "longcat_flash", "mellum", "minicpm3", "minimax_m2",
        "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe",
        "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
        "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
    }
)  # fmt: skip
"""Model types that are served many sequences at a time.

Attention is their only state, and paged attention computes theirs: causal, with a window, with sinks, with a cap. A
test compares the answers of each with `generate` and PEFT.
"""

_HYBRIDS = frozenset({"granitemoehybrid"})
"""Model types of which some bases have layers with other states; those that have none are served as `BATCHED` ones."""

PACKED = frozenset(
    {
        "afmoe", "apertus", "arcee", "aria_text", "beam", "biogpt", "codegen", "cohere", "cohere2", "cohere2_moe",
        "cohere_compass_text", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1",
        "emu3_text_model", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "flex_olmo", "flint", "gemma",
        "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe",
        "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite",
        "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium",
        "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe",
        "kolibri1", "laguna", "llama", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3",
        "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron",
        "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu",
    }
)  # fmt: skip
"""Model types that compute the samples of a packed row as they compute each alone.

Their tokens meet only in attention, which takes the row's mask and its positions. A test compares losses and gradients
of each with the samples alone.
"""

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, by transformers' names, that take a mask and keep no other state."""

_ENCODERS = frozenset(
    {
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip
"""Model types whose tokens see those behind them, unless their config says `is_decoder`."""


_SEES_LATER = "its tokens see those behind them"
_NOT_CAUSAL = {
    "cpmant": _SEES_LATER,
    "reformer": "its attention draws hashes at random",
    "xlm": _SEES_LATER,
    "xlnet": _SEES_LATER,
}
"""Model types that transformers registers as causal language models and that are none -> the reason."""

_OTHER_WITH_CACHE = frozenset({"axk2", "recurrent_gemma"})
"""Model types that compute other answers with their own cache than without; docs/models.md measures it."""


def capability_of(config: Any) -> Capability:
    """Return how a base with this transformers config is trained and served."""
    if reason := _not_causal(config):
        return Capability(Support("refused", reason), Support("refused", reason))
    text = config.get_text_config()
    return Capability(_training(text), _serving(text))


def _not_causal(config: Any) -> str:
    """Return why the base is no causal language model, else nothing."""
    if getattr(config, "is_encoder_decoder", False):
        return f"{config.model_type} is an encoder-decoder, not a causal language model"
    if reason := _NOT_CAUSAL.get(config.model_type):
        return f"{config.model_type} is no causal language model: {reason}"
    if config.model_type in _ENCODERS and not getattr(config, "is_decoder", False):
        return f"{config.model_type} is an encoder, whose tokens see those behind them, not a causal language model"
    return ""


def _training(text: Any) -> Support:
    longest, limit = _rope_limits(text)
    if states := sorted({kind for kind in layer_kinds(text) if kind not in ATTENTION}):
        return Support(
            "single", f"its {', '.join(states)} layers would let one sample of a row see another", longest, limit
        )
    if getattr(text, "alibi", False) or _has_alibi(getattr(text, "attn_config", None)):
        reason = f"{text.model_type} with ALiBi takes distances from the row, not from the sample"
        return Support("single", reason, longest, limit)
    if text.model_type not in PACKED:
        return Support("single", f"{text.model_type} is not known to keep the samples of a row apart", longest, limit)
    return Support("batched", "", longest, limit)


def _serving(text: Any) -> Support:
    if text.model_type in _OTHER_WITH_CACHE:
        return Support("refused", f"{text.model_type} computes other answers with its cache than without")
    states = _states_of(text)
    if text.model_type in BATCHED or (text.model_type in _HYBRIDS and layer_kinds(text) and not states):
        return Support("batched")
    if states:
        return Support("single", f"its {states} layers keep states that cannot be cut into blocks")
    return Support("single", f"{text.model_type} is not known to keep no state but attention's, computed as ours is")


def _states_of(text: Any) -> str:
    """Return the kinds of layers that are not attention, or an empty string."""
    return ", ".join(sorted({kind for kind in layer_kinds(text) if kind not in ATTENTION}))


def layer_kinds(text: Any) -> list[str]:
    """Return the kind of each layer by transformers' names; an empty list where the config has one kind only."""
    return list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())


def _has_alibi(attention: Any) -> bool:
    found = attention.get("alibi") if isinstance(attention, dict) else getattr(attention, "alibi", None)
    return bool(found)


def _rope_limits(text: Any) -> tuple[int | None, int | None]:
    """Return `longest` and `limit` of a base whose rotary frequencies depend on the longest sequence of a pass.

    Those of `longrope` do beyond the length of the original training. Those of `dynamic` then depend on the passes
    before, too (transformers, modeling_rope_utils.py).
    """
    for rope in _rope_parameters(text):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind == "longrope" or "dynamic" in kind:
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            length = int(original or text.max_position_embeddings)
            return length, length if kind != "longrope" else None
    return None, None


def _rope_parameters(text: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters of the model, or those of each kind of layer."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if isinstance(found, dict):
        nested = [value for value in found.values() if isinstance(value, dict)]
        yield from nested or [found]
