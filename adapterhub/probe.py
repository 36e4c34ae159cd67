"""The probe of an adapter: fixed prompts and their answers, recorded at packing and replayed later."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.chat_template import chat_date, encode_chat, reads_clock
from adapterhub.errors import IncompatibleBase, ProbeMismatch
from adapterhub.package.layout import TEMPLATE_NAME
from adapterhub.package.manifest import Manifest, Probe, ProbeAnswer, Quantization
from adapterhub.package.own_template import own_template

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter, BaseRef
    from adapterhub.bases.loading import LoadedBase

PROMPTS = ("What is the capital of France?", "Tell me about yourself.", "How do I sort a list in Python?")
NUM_TOKENS = 12
NUM_TOP = 5
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.75, "float16": 0.25}
"""Largest accepted difference of a top logit. Measured between kernels of one dtype: 0.3 in bf16 on a 135M model."""


def record(base: LoadedBase, folder: Path, *, date: datetime.date | None = None) -> Probe:
    """Answer each prompt greedily with PEFT's own model, which is the reference for every engine.

    A chat template that reads the clock renders `date`, by default today, and the probe records it.
    """
    template, _ = template_of(folder, base.ref, base.tokenizer)
    day = (date or datetime.date.today()) if reads_clock(template) else None
    with chat_date(day):
        answers = _answers(base, folder, PROMPTS)
    return Probe(dtype=base.quantization.compute_dtype, date=day.isoformat() if day else None, answers=answers)


def replay(base: LoadedBase, adapter: Adapter) -> None:
    """Answer the prompts of the adapter's probe again and compare. It must have one.

    Raises ProbeMismatch with the prompt, both values and the likely cause.
    """
    recorded = adapter.probe
    assert recorded is not None
    tolerance = max(TOLERANCE[recorded.dtype], TOLERANCE[base.quantization.compute_dtype])
    quantization = base.quantization
    with chat_date(datetime.date.fromisoformat(recorded.date) if recorded.date else None):
        answers = _answers(base, adapter.path, [then.prompt for then in recorded.answers])
    for now, then in zip(answers, recorded.answers, strict=True):
        cause = likely_cause(
            adapter,
            fingerprint=base.ref.fingerprint,
            weights=quantization.weights,
            dtype=quantization.compute_dtype,
            renders_alike=now.prompt_tokens == then.prompt_tokens,
        )
        compare(now, then, tolerance=tolerance, cause=cause)


def recorded_on(manifest: Manifest) -> str:
    """Return the weights that the probe was recorded on (`Quantization.weights`): training's, else plain NF4."""
    return (manifest.base.quantization or Quantization()).weights


def likely_cause(
    adapter: Adapter, *, fingerprint: str | None, weights: str, dtype: str, renders_alike: bool = True
) -> str:
    """Name the difference between the recording and here: template, base, quantization or dtype.

    `weights` are the base's here (`Quantization.weights`), `dtype` is its compute dtype.
    """
    base, probe = adapter.manifest.base, adapter.probe
    assert probe is not None
    if not renders_alike:
        return "another chat template or tokenizer than it was packed with"
    if fingerprint is not None and fingerprint != base.fingerprint:
        return f"another base: packed on {base.id} {base.fingerprint[:20]}, this is {fingerprint[:20]}"
    recorded = recorded_on(adapter.manifest)
    if weights != recorded:
        return f"another quantization: recorded on {recorded} weights, these are {weights}"
    if dtype != probe.dtype:
        return f"another dtype: recorded in {probe.dtype}, computed in {dtype}"
    return "another base than it was packed on, weights changed since, or kernels that compute differently"


def compare(now: ProbeAnswer, then: ProbeAnswer, *, tolerance: float, cause: str) -> None:
    """Check that the top logits agree within `tolerance`, and the tokens up to the first near-tie.

    A near-tie is a step whose two best logits were recorded closer than twice the tolerance: rounding may choose
    either. Raises ProbeMismatch.
    """
    if now.prompt_tokens != then.prompt_tokens:
        raise ProbeMismatch(f"the prompt {then.prompt!r} now renders to other tokens; likely cause: {cause}.")
    theirs = dict(zip(now.top_tokens, now.top_logits, strict=True))
    for token, logit in zip(then.top_tokens[:1], then.top_logits[:1], strict=True):
        found = theirs.get(token)
        if found is None or abs(found - logit) > tolerance:
            raise ProbeMismatch(
                f"after {then.prompt!r} token {token} has logit {found}, recorded {logit:.3f} (tolerance "
                f"{tolerance}); likely cause: {cause}."
            )
    for place, (token, expected, gap) in enumerate(zip(now.tokens, then.tokens, then.gaps, strict=False)):
        if gap < 2 * tolerance:
            return
        if token != expected:
            raise ProbeMismatch(
                f"after {then.prompt!r} token {place} is {token}, recorded {expected} with a lead of {gap:.2f}; "
                f"likely cause: {cause}."
            )


def template_of(folder: Path, base: BaseRef, tokenizer: Any) -> tuple[str, str]:
    """Return (chat template of an adapter folder, else the base's; where it was found).

    Raises IncompatibleBase when neither has one: without it no prompt can be rendered. Raises InvalidManifest.
    """
    if (own := own_template(folder)) is not None:
        return own
    if not tokenizer.chat_template:
        raise IncompatibleBase(
            f"base {base} has no chat template, and {folder} has none either: expected one to render the probe's "
            f"prompts with. Write it to {folder / TEMPLATE_NAME}, or use an instruction-tuned base."
        )
    return str(tokenizer.get_chat_template()), "the base"


def generate_greedily(
    model: Any, inputs: Mapping[str, Any], *, num_tokens: int, pad_token_id: int | None = None,
    wants_logits: bool = False,
) -> Any:  # fmt: skip
    """Return what `generate` of transformers returns for an answer of the likeliest tokens, up to `num_tokens`.

    Of the base's own generation config only its end tokens (and its padding, without `pad_token_id`) are used: a
    penalty or a suppressed token of it would change which token follows, and every engine computes plain greedy.
    """
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    of_base = owner.generation_config
    own = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=of_base.eos_token_id,
        pad_token_id=of_base.pad_token_id if pad_token_id is None else pad_token_id,
        return_dict_in_generate=wants_logits,
        output_logits=wants_logits,
    )
    # Passing `own` is not enough: transformers fills every setting that is None in it from the model's.
    owner.generation_config = own
    try:
        return model.generate(**inputs, generation_config=own)
    finally:
        owner.generation_config = of_base


def _answers(base: LoadedBase, folder: Path, prompts: Sequence[str]) -> list[ProbeAnswer]:
    from peft import PeftModel

    from adapterhub.bases.peft_config import peft_config

    template, _ = template_of(folder, base.ref, base.tokenizer)
    config = peft_config(folder, base.model)
    model = PeftModel.from_pretrained(base.model, str(folder), config=config, low_cpu_mem_usage=True)
    model.eval()
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:  # kept as saved, while all around them computes in the base's dtype
            parameter.data = parameter.data.to(base.model.dtype)
    try:
        return [_answer(model, base.tokenizer, template, text) for text in prompts]
    finally:
        model.unload()


def _answer(model: Any, tokenizer: Any, template: str, prompt: str) -> ProbeAnswer:
    import torch

    messages = [{"role": "user", "content": prompt}]
    prompt_tokens = torch.tensor(
        encode_chat(tokenizer, messages, template=template, add_generation_prompt=True), device=model.device
    )
    inputs = {"input_ids": prompt_tokens[None], "attention_mask": torch.ones_like(prompt_tokens)[None]}
    with torch.inference_mode():
        out = generate_greedily(model, inputs, num_tokens=NUM_TOKENS, wants_logits=True)
    best_two = [step[0].float().topk(2).values for step in out.logits]
    top = out.logits[0][0].float().topk(NUM_TOP)
    return ProbeAnswer(
        prompt=prompt,
        prompt_tokens=prompt_tokens.tolist(),
        tokens=out.sequences[0, len(prompt_tokens) :].tolist(),
        gaps=[round(float(pair[0] - pair[1]), 4) for pair in best_two],
        top_tokens=top.indices.tolist(),
        top_logits=[round(float(value), 4) for value in top.values],
    )
