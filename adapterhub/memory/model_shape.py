"""The shape of a model, as memory estimates need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only model, as its config.json states them."""

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
    def linear_weights(self) -> int:
        """Weights of all layers' linear modules, which quantization applies to."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.layer_linears().values())

    @property
    def embedding_weights(self) -> int:
        """Weights of embedding and output head, counted once when they are tied."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    @property
    def weights(self) -> int:
        """Weights of the whole model."""
        return self.linear_weights + self.embedding_weights + self.hidden * (2 * self.layers + 1)

    def lora_weights(self, rank: int, modules: Sequence[str] = (), *, is_dora: bool = False) -> int:
        """Return the weights of A and B of rank `rank` on these modules, on all linear ones when none is named.

        `embed_tokens` and `lm_head` name embedding and head. DoRA adds a magnitude for each output
        (arXiv 2402.09353). Raises KeyError for another name.
        """
        linears = self.layer_linears()
        outside = {"embed_tokens": (self.vocabulary, self.hidden), "lm_head": (self.hidden, self.vocabulary)}
        found = 0
        for name in modules or linears:
            inputs, outputs = outside[name] if name in outside else linears[name]
            weights = rank * (inputs + outputs) + (outputs if is_dora else 0)
            found += weights * (1 if name in outside else self.layers)
        return found
