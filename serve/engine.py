"""The Engine protocol and its data. Knows neither HTTP nor where adapters come from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from adapterhub.adapter import Adapter


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class GuidedDecoding:
    """What a whole answer must match: guided decoding."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    """The schema as JSON, the regular expression, or a Lark grammar."""


@dataclass(frozen=True)
class SamplingParams:
    """Settings for sampling tokens. Temperature 0 is greedy; filters apply in the order of the fields."""

    max_tokens: int = 128
    """Maximum answer length, in tokens."""
    temperature: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(Token, number added to its logit)."""
    repetition_penalty: float = 1.0
    """Penalty for tokens of prompt and answer, 1 for none (arXiv 1909.05858, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the answer (OpenAI API)."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token is already in the answer (OpenAI API)."""
    top_k: int = 0
    """Number of most probable tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Probability mass to keep: the smallest set that sums to at least p (nucleus sampling, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Smallest probability to keep, as a fraction of the best token's (arXiv 2407.01082)."""
    seed: int | None = None
    """Random seed: same seed, prompt and adapter give the same answer, whatever runs beside it."""
    guided_decoding: GuidedDecoding | None = None
    """Guided decoding, applied last: a token that it forbids is never chosen."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not returned."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Whether the answer continues after the model's end token."""
    top_logprobs: int | None = None
    """Number of most probable tokens to list with log-probabilities, besides the chosen one; None lists nothing."""


@dataclass(frozen=True)
class AdapterScale:
    """One adapter of a request's mix: the update is multiplied by `scale`."""

    digest: str
    scale: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """A request as the engine computes it: without `adapters`, the bare base; several adapters are added together."""

    id: str
    prompt: tuple[int, ...]
    """Token ids."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapters: tuple[AdapterScale, ...] = ()
    weight: float = 1.0
    """Share relative to other adapters' requests: 2 is served twice as much as 1 when both wait."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer with its log-probability."""

    token: int
    text: str
    """The token's name: its text, or `bytes:\\xf0\\x9f` where it is part of a character."""
    data: bytes | None
    """Bytes that the token adds to the text; None for a special token, which adds none."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """Most probable tokens, in descending order."""
    offset: int = 0
    """Number of characters of the answer before the token."""


@dataclass(frozen=True)
class Delta:
    """What one step adds to an answer. The last delta, and only it, has a finish reason."""

    text: str
    num_tokens: int
    """Number of tokens of the answer so far."""
    tokens: tuple[int, ...] = ()
    """Tokens that this delta adds."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Entries of tokens whose text is final; tokens that end the answer without being text are never listed."""
    num_cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache."""


@dataclass(frozen=True)
class EngineStatus:
    """Figures for /metrics and /ready."""

    ready: bool
    reason: str
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """Fraction of KV blocks in use, 0 to 1."""
    num_preemptions: int = 0
    has_ended: bool = False
    """Whether the engine has ended and will not be ready again."""


@dataclass(frozen=True)
class Precision:
    """How the base's weights are stored and computed: an adapter answers best on the weights it was trained on."""

    weights: str
    """Storage of weights: nf4, "fp4, blocks of 128" (`Quantization.weights`), bfloat16, awq, ...; or unknown."""
    dtype: str
    """Dtype of the arithmetic."""

    def __str__(self) -> str:
        if self.weights == "unknown":
            return "weights of a precision that its servers do not report"
        return f"{self.weights} weights, computed in {self.dtype}"


class Engine(Protocol):
    """One base model that answers with any loaded adapter."""

    max_model_len: int
    """Maximum length of prompt and answer together, in tokens."""
    dtype: str
    """Dtype the model computes in: float32, bfloat16 or float16."""
    precision: Precision

    def size_of(self, adapter: Adapter) -> int:
        """Return the size of `adapter` when it is loaded, in bytes."""
        ...

    async def load(self, adapter: Adapter) -> None:
        """Make `adapter` usable by its digest; nothing changes when this fails.

        Raises AdapterUnsupported, AdapterNoEffect, IncompatibleBase, RankTooLarge, AdapterLoadFailed.
        """
        ...

    async def unload(self, digest: str) -> None:
        """Unload an adapter that no request uses."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream an answer; closing the iterator aborts the request within one step.

        Raises UsageError, RequestTooLong, ServerBusy, EngineStopped, RequestFailed.
        """
        ...

    def status(self) -> EngineStatus:
        """Return the engine's state now."""
        ...

    async def close(self) -> None:
        """Stop the engine; open answers end with EngineStopped."""
        ...
