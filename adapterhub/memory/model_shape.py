"""The shape of a model, as memory estimates need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerSizes:
    """Linear layers of one name and shape."""

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True)
class CountedWeights:
    """Weights of a model that were counted layer by layer, whatever its architecture."""

    linears: tuple[LayerSizes, ...]
    """Linear layers, the output head excepted."""
    total: int
    experts: int = 0
    """Weights of experts that share one tensor, which bitsandbytes leaves as they are."""
    active: int | None = None
    """Weights that one token is computed with; None: not known."""
    cached: int = 0
    """Numbers that the KV cache of all layers has for one token."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. Without `counted` they are those of LLaMA's architecture (arXiv 2302.13971)."""

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    """Width of the keys of all heads together."""
    vocabulary: int
    query: int = 0
    """Width of the queries of all heads together; 0: the hidden size."""
    is_tied: bool = False
    """Whether one matrix is both embedding and output head."""
    counted: CountedWeights | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Return the shape that a config.json states.

        Raises KeyError for a config without these sizes, each a single number (Gemma 3n has one for each layer).
        """
        for key in ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
            if type(config[key]) is not int or config[key] < 1:
                raise KeyError(key)
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            key_value=head * (config.get("num_key_value_heads") or heads),
            vocabulary=config["vocab_size"],
            query=head * heads,
            is_tied=bool(config.get("tie_word_embeddings", False)),
        )

    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """Return name -> (inputs, outputs) of one layer's linear modules, gated as in LLaMA (arXiv 2302.13971)."""
        query = self.query or self.hidden
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linears(self) -> tuple[LayerSizes, ...]:
        """All linear layers but the output head; quantization applies to them."""
        if self.counted is not None:
            return self.counted.linears
        return tuple(LayerSizes(name, *sizes, self.layers) for name, sizes in self.layer_linears().items())

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' linear modules, which quantization applies to."""
        return sum(one.inputs * one.outputs * one.count for one in self.linears)

    @property
    def expert_weights(self) -> int:
        """Weights of experts that stay in 16 bit on a 4-bit base."""
        return self.counted.experts if self.counted else 0

    @property
    def cached_numbers(self) -> int:
        """Numbers that the KV cache has for one token."""
        return self.counted.cached if self.counted else 2 * self.layers * self.key_value

    @property
    def embedding_weights(self) -> int:
        """Weights of embedding and output head, counted once when they are tied."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    @property
    def weights(self) -> int:
        """Weights of the whole model."""
        if self.counted is not None:
            return self.counted.total
        return self.linear_weights + self.embedding_weights + self.hidden * (2 * self.layers + 1)

    def lora_weights(self, rank: int, modules: Sequence[str] = (), *, is_dora: bool = False) -> int:
        """Return the weights of A and B of rank `rank` on these modules, on all linear ones when none is named.

        `embed_tokens` and `lm_head` name embedding and head. DoRA adds a magnitude for each output
        (arXiv 2402.09353). Raises KeyError for another name.
        """
        outside = (
            LayerSizes("embed_tokens", self.vocabulary, self.hidden, 1),
            LayerSizes("lm_head", self.hidden, self.vocabulary, 1),
        )
        adapted = [one for one in (*self.linears, *outside) if one.name in modules] if modules else self.linears
        if unknown := set(modules) - {one.name for one in adapted}:
            raise KeyError(min(unknown))
        return sum(one.count * (rank * (one.inputs + one.outputs) + (one.outputs if is_dora else 0)) for one in adapted)
