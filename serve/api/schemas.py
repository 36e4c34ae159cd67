"""OpenAI's request and response schemas, and their translation to the engine's types.

https://platform.openai.com/docs/api-reference/chat and /completions; extensions are named in docs/api.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from adapterhub.errors import UsageError
from serve.api.request_limits import check_length
from serve.engine import GuidedDecoding, SamplingParams, TokenLogprob


class _Wire(BaseModel):
    """Base of all schemas: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


def _not_a_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def _underflow(value: float) -> float:
    return 0.0 if abs(value) < _LEAST_FP32 else value


_LEAST_FP32 = 2.0**-126
"""Smallest normal number of fp32, which the engine computes in."""


def _token_id(key: str) -> str:
    """Refuse other spellings of a token id, so that no two keys are the same token."""
    if not re.fullmatch("0|[1-9][0-9]{0,18}", key):
        raise ValueError("expected a token id: digits, without sign, space or exponent")
    return key


def _as_json(value: object) -> object:
    """Return a schema as the engine's text, no longer than the client's."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) if isinstance(value, dict) else value


def _as_json_of_object(value: object) -> object:
    if value is not None and not isinstance(value, dict):
        raise ValueError("expected an object: the schema")
    return _as_json(value)


def _check_choices(choices: list[str]) -> list[str]:
    check_length(sum(map(len, choices)))
    return choices


def _check_text(text: str) -> str:
    check_length(len(text))
    return text


Float = Annotated[float, BeforeValidator(_not_a_boolean), Field(allow_inf_nan=False)]
Int = Annotated[int, BeforeValidator(_not_a_boolean)]
Fp32 = AfterValidator(_underflow)
"""Validator after the bounds: what would be 0 in fp32 becomes 0."""
TokenKey = Annotated[str, AfterValidator(_token_id)]
Bias = Annotated[Float, Field(ge=-100, le=100), Fp32]
BoundedText = Annotated[str, AfterValidator(_check_text)]
Schema = Annotated[BoundedText, BeforeValidator(_as_json_of_object, json_schema_input_type=dict[str, Any])]
AnySchema = Annotated[BoundedText, BeforeValidator(_as_json, json_schema_input_type=dict[str, Any] | str)]
"""JSON schema as text, sent as an object or as text."""


Name = Annotated[str, Field(max_length=500)]
Label = Annotated[str, Field(max_length=512)]
"""Text without effect, kept in memory for as long as the request."""


class TextPart(_Wire):
    """Text content of a message."""

    type: Literal["text"]
    text: str


class Message(_Wire):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Label | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class AdapterChoice(_Wire):
    """An adapter of a mix, by published name, and the scale of its update (our extension)."""

    name: Name
    scale: Annotated[Float, Field(ge=-4.0, le=4.0), Fp32] = 1.0


class JsonSchema(_Wire):
    """A named JSON schema."""

    name: Label = "answer"
    description: BoundedText | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Wire):
    """OpenAI's guided decoding: free text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema with type 'json_schema', and only with it")
        return self

    def guided_decoding(self) -> GuidedDecoding | None:
        """Return it as the engine takes it."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else None
        return GuidedDecoding("json_schema", '{"type":"object"}' if schema is None else schema)


class StructuredOutputs(_Wire):
    """vLLM's guided decoding: exactly one of the fields."""

    json_: AnySchema | None = Field(None, alias="json")
    regex: BoundedText | None = None
    choice: Annotated[list[str], Field(min_length=1), AfterValidator(_check_choices)] | None = None
    grammar: BoundedText | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(one is not None for one in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("expected exactly one of json, regex, choice and grammar")
        return self

    def guided_decoding(self) -> GuidedDecoding:
        """Return it as the engine takes it."""
        if self.json_ is not None:
            return GuidedDecoding("json_schema", self.json_)
        if self.regex is not None:
            return GuidedDecoding("regex", self.regex)
        if self.choice is not None:
            return GuidedDecoding("regex", "|".join(f"(?:{re.escape(one)})" for one in self.choice))
        return GuidedDecoding("grammar", str(self.grammar))


_BEST_ONLY = 1e-6
"""A top_p that keeps the best token alone, in place of 0, which vLLM refuses."""


class StreamOptions(_Wire):
    """Options of a streamed completion."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Request(_Wire):
    """Fields that chat and text completions share."""

    model: Name
    adapter: AdapterChoice | list[AdapterChoice] | None = None
    max_tokens: Int | None = Field(None, ge=1)
    temperature: Annotated[Float, Field(ge=0.0, le=2.0), Fp32] = 1.0
    top_p: Annotated[Float, Field(gt=0.0, le=1.0), Fp32] = 1.0
    n: Int = Field(1, ge=1, le=16)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Annotated[Float, Field(ge=-2.0, le=2.0), Fp32] = 0.0
    frequency_penalty: Annotated[Float, Field(ge=-2.0, le=2.0), Fp32] = 0.0
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=300)] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's extensions
    top_k: Int = Field(0, ge=-1)
    min_p: Annotated[Float, Field(ge=0.0, le=1.0), Fp32] = 0.0
    repetition_penalty: Annotated[Float, Field(ge=0.01, le=10.0), Fp32] = 1.0
    ignore_eos: bool = False
    stop_token_ids: list[Int] = []
    structured_outputs: StructuredOutputs | None = None
    # accepted because clients send them; without effect
    user: Label | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    _guided_decoding: GuidedDecoding | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _no_empty_stop(self) -> _Request:
        if "" in self.stop_strings:
            raise ValueError("expected a stop string that is not empty")
        return self

    @model_validator(mode="after")
    def _one_guided_decoding(self) -> _Request:
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("expected one of response_format and structured_outputs, not both")
        asked = self.structured_outputs or self.response_format
        self._guided_decoding = asked.guided_decoding() if asked else None
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The strings of `stop`."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def choices(self) -> list[AdapterChoice]:
        """Return the adapters of the `adapter` extension."""
        if self.adapter is None:
            return []
        return self.adapter if isinstance(self.adapter, list) else [self.adapter]

    def sampling(
        self, *, max_tokens: int, extra_stop: list[str], end_tokens: list[int], top_logprobs: int | None
    ) -> list[SamplingParams]:
        """Return the sampling parameters of each choice."""
        first = SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            guided_decoding=self._guided_decoding,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            top_k=max(self.top_k, 0),
            top_p=max(self.top_p, _BEST_ONLY),
            min_p=self.min_p,
            stop=(*self.stop_strings, *extra_stop),
            stop_token_ids=(*self.stop_token_ids, *end_tokens),
            ignore_eos=self.ignore_eos,
            top_logprobs=top_logprobs,
        )
        if self.seed is None:
            return [first] * self.n
        # Each choice has a seed of its own, and can be repeated.
        return [replace(first, seed=(self.seed + index) % 2**63) for index in range(self.n)]


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: Int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Int = Field(0, ge=0, le=20)

    @property
    def wanted_tokens(self) -> int | None:
        """Maximum answer length, in tokens; None where the request has none."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of most likely tokens to list; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Request):
    """Body of POST /v1/completions."""

    prompt: str | Annotated[list[Int], Field(fail_fast=True)] | Annotated[list[str], Field(fail_fast=True)]
    logprobs: Int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def wanted_tokens(self) -> int | None:
        """Maximum answer length, in tokens; None where the request has none."""
        return self.max_tokens or 16  # OpenAI's default for this endpoint

    def single_prompt(self) -> str | list[int]:
        """Return the prompt, as text or token ids. Raises UsageError for several prompts."""
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            if len(self.prompt) > 1:
                raise UsageError(
                    f"the request has {len(self.prompt)} prompts: expected one. Send one request for each."
                )
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]


class LoadRequest(_Wire):
    """Body of POST /v1/load_lora_adapter. `lora_path` is a registry name, a digest, or owner/name on the Hub."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$")
    lora_path: Name
    load_inplace: bool = False


class UnloadRequest(_Wire):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: Name
    lora_int_id: int | None = None


def kind_of_error(status: int) -> str:
    """Return OpenAI's `type` of an error with this HTTP status."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(message: str, *, code: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's body of an error response."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0) -> dict[str, Any]:
    """Return OpenAI's usage figures."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def chat_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """Return log-probabilities as a chat completion has them."""
    return {"content": [_one_logprob(one) for one in logprobs], "refusal": None}


def _one_logprob(one: TokenLogprob) -> dict[str, Any]:
    return {
        "token": one.text,
        "logprob": one.logprob,
        "bytes": _byte_list(one),
        "top_logprobs": [{"token": top.text, "logprob": top.logprob, "bytes": _byte_list(top)} for top in one.top],
    }


def _byte_list(one: TokenLogprob) -> list[int] | None:
    return None if one.data is None else list(one.data)


def completion_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """Return log-probabilities as a text completion has them."""
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [_top_by_name(one) for one in logprobs],
        "text_offset": [one.offset for one in logprobs],
    }


def _top_by_name(one: TokenLogprob) -> dict[str, float]:
    """Return the most likely tokens and the sampled one, up to n + 1; a second token of one text by its id."""
    names = {one.token: one.text}
    for top in one.top:
        if top.token not in names:
            names[top.token] = f"token_id:{top.token}" if top.text in names.values() else top.text
    return {names[each.token]: each.logprob for each in (*one.top, one)}
