"""Translate a request into vLLM's /v1/completions, and its events into deltas."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from adapterhub.errors import EngineStopped
from serve.engine import Delta, FinishReason, GenerationRequest, TokenLogprob
from serve.vllm_engine import compat


def body_of(request: GenerationRequest, model: str) -> dict[str, Any]:
    """Return the body of a /v1/completions request, with vLLM's field names."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or compat.KEEP_ALL_TOKENS,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.guided_decoding is not None:
        key = compat.GUIDED_DECODING_KEYS[sampling.guided_decoding.kind]
        body["structured_outputs"] = {key: sampling.guided_decoding.text}
    if sampling.top_logprobs is not None:
        body |= {"logprobs": sampling.top_logprobs, "return_tokens_as_token_ids": True}
    return body


async def deltas_of(
    events: AsyncGenerator[dict[str, Any], None], request: GenerationRequest, tokenizer: Any
) -> AsyncGenerator[Delta, None]:
    """Translate vLLM's events into deltas. The last delta waits for the usage, which comes after it.

    Raises EngineStopped for an answer that vLLM aborted.
    """
    count, num_cached_tokens, offset = 0, 0, 0
    last: Delta | None = None
    async for event in events:
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        num_cached_tokens = int(details.get("cached_tokens") or num_cached_tokens)
        for choice in event["choices"]:
            tokens = tuple(choice.get("token_ids") or ())
            count += len(tokens)
            logprobs = _logprobs(choice.get("logprobs"), request.sampling.top_logprobs, tokenizer, offset)
            offset += sum(len(one.text) for one in logprobs)
            delta = Delta(choice["text"], count, tokens, None, logprobs, num_cached_tokens)
            if choice.get("finish_reason") in ("abort", "error"):
                raise EngineStopped(f"vLLM aborted the answer ({choice['finish_reason']}): ask again.")
            if choice.get("finish_reason") is None:
                yield delta
            else:
                last = delta
                reason = FinishReason.LENGTH if choice["finish_reason"] == "length" else FinishReason.STOP
    if last is None:
        raise EngineStopped("vLLM ended an answer without a finish reason: ask again.")
    yield Delta(last.text, last.num_tokens, last.tokens, reason, last.logprobs, num_cached_tokens)


def _logprobs(
    found: dict[str, Any] | None, num_top: int | None, tokenizer: Any, offset: int
) -> tuple[TokenLogprob, ...]:
    """Read parallel lists, with tokens written as `token_id:NUMBER`; the first begins at `offset` of the answer."""
    if found is None or num_top is None:
        return ()

    def number(text: str) -> int:
        return int(text.removeprefix("token_id:"))

    def one(token: int, logprob: float, top: tuple[TokenLogprob, ...] = (), offset: int = 0) -> TokenLogprob:
        text = str(tokenizer.decode([token]))
        return TokenLogprob(token, text, text.encode(), logprob, top, offset)

    result: list[TokenLogprob] = []
    for text, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        strongest = sorted(((number(t), p) for t, p in (top or {}).items()), key=lambda one: -one[1])[:num_top]
        result.append(one(number(text), logprob, tuple(one(*pair) for pair in strongest), offset))
        offset += len(result[-1].text)
    return tuple(result)
