"""What an engine is, and the data that passes through it. Knows neither HTTP nor where adapters come from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from adapterhub.adapter import Adapter


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Constraint:
    """What an answer must fit from its first character to its last."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str
    """the schema as JSON, the expression, or a Lark grammar"""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy; the filters apply in the order written here."""

    max_tokens: int = 128
    temperature: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, added to its logit)"""
    repetition_penalty: float = 1.0
    """arXiv 1909.05858, section 4.1; over prompt and answer"""
    presence_penalty: float = 0.0
    """subtracted once from the logit of every token already in the answer (OpenAI API)"""
    frequency_penalty: float = 0.0
    """subtracted for each time a token is already in the answer (OpenAI API)"""
    top_k: int = 0
    """keep the k strongest tokens; 0 keeps all"""
    top_p: float = 1.0
    """keep the smallest set whose probabilities sum to at least p (arXiv 1904.09751)"""
    min_p: float = 0.0
    """keep tokens at least this fraction as probable as the best one (arXiv 2407.01082)"""
    seed: int | None = None
    """same seed, prompt and adapter: same answer, whatever runs beside it"""
    constraint: Constraint | None = None
    """applied last: what it forbids is never chosen"""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    """None: no log-probabilities; n: that of the chosen token and of the n strongest"""


@dataclass(frozen=True)
class AdapterScale:
    """One adapter of a request's mix: the update is multiplied by `scale`."""

    digest: str
    scale: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """`adapters` empty means the bare base; several are added together."""

    id: str
    prompt: tuple[int, ...]
    """token ids"""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapters: tuple[AdapterScale, ...] = ()
    weight: float = 1.0
    """its share beside other adapters' requests: 2 is served twice as much as 1 when both wait"""


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    text: str
    """the token's name: its text, or `bytes:\\xf0\\x9f` where it is part of a character"""
    data: bytes | None
    """the bytes it adds to the text; None for a special token, which adds none"""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """the strongest candidates, strongest first"""
    offset: int = 0
    """characters of the answer before it"""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one, and only it, has a finish reason."""

    text: str
    num_tokens: int
    """tokens of the answer so far"""
    tokens: tuple[int, ...] = ()
    """the tokens this piece adds"""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """of the tokens whose text is certain by now: those that end the answer without being text are never listed"""
    num_cached_tokens: int = 0
    """prompt tokens whose keys and values an earlier request had left in the cache"""


@dataclass(frozen=True)
class EngineStatus:
    """Figures for /metrics and /ready."""

    ready: bool
    reason: str
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """fraction of KV blocks in use"""
    num_preemptions: int = 0
    has_ended: bool = False
    """not ready, and never again"""


@dataclass(frozen=True)
class Precision:
    """How the base is held: an adapter answers best on the weights it was trained on."""

    weights: str
    """nf4, "fp4, blocks of 128" (`Quantization.weights`), bfloat16, awq, ...; unknown where a server does not tell"""
    dtype: str
    """of the arithmetic"""

    def __str__(self) -> str:
        if self.weights == "unknown":
            return "weights of a precision its servers do not tell"
        return f"{self.weights} weights, computed in {self.dtype}"


class Engine(Protocol):
    """One base model that answers with any loaded adapter."""

    max_model_len: int
    """tokens of prompt and answer together"""
    dtype: str
    """what the model computes in: float32, bfloat16 or float16"""
    precision: Precision

    def size_of(self, adapter: Adapter) -> int:
        """Return the bytes `adapter` takes when it is loaded."""
        ...

    async def load(self, adapter: Adapter) -> None:
        """Make `adapter` usable by its digest; nothing changes when this fails.

        Raises AdapterUnsupported, AdapterNoEffect, IncompatibleBase, RankTooLarge, AdapterLoadFailed.
        """
        ...

    async def unload(self, digest: str) -> None:
        """Free an adapter no request is using."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream an answer; closing the iterator aborts the request within one step.

        Raises UsageError, RequestTooLong, ServerBusy, EngineStopped, RequestFailed.
        """
        ...

    def status(self) -> EngineStatus: ...

    async def close(self) -> None: ...
