"""Check, before a run trains, that the model computes rows of samples as it computes each sample alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from adapterhub.bases.capabilities import Support
from adapterhub.bases.self_check_cache import is_proven, machine_of, remember
from adapterhub.errors import IncompatibleBase
from train.data.packing import pack
from train.data.tokenization import Sample
from train.model.lora import trainable
from train.objectives.forward import bare_model, row_support, rows_of, token_losses, use_single_rows
from train.recipe import Recipe

_PREFIX, _LENGTHS, _WINDOW = 3, (14, 10), 4
"""Of the check's samples: number of tokens that they share, their lengths, and the window, so that it counts."""
_LIMITS = {"float32": (1e-3, 1e-3), "float16": (0.015, 0.15), "bfloat16": (0.04, 0.5), "int8": (0.06, 0.6)}
"""Dtype -> largest differences of losses and of gradients, relative to their size.

Rounding makes up to 2e-5 in fp32 on small random models; on SmolLM2 with a random adapter up to 0.002 and 0.01 in fp16,
0.014 and 0.14 in bf16. Samples that see each other differ by 0.03 and more in their losses and by 0.04 to 1 in their
gradients, on random models.
"""


def check_rows(model: Any, recipe: Recipe, fingerprint: str | None, tokens: Sequence[int]) -> tuple[str, ...]:
    """Check packed rows against the model's own forward pass on each sample, losses and gradients; return what to say.

    `tokens` are some of the run's own. A model that computes packed samples otherwise is trained on one sample a row
    from now on. Weights, gradients, modes and random numbers are left as they were. What passed once on this machine
    is not checked again (bases/self_check_cache.py).

    Raises IncompatibleBase if one sample a row is not right either: the base looks at later tokens, keeps state from
    one forward pass to the next, or cannot be differentiated.
    """
    support = row_support(model)
    facts = {
        "rows": support.mode,
        "dtype": str(model.dtype),
        "device": machine_of(model.device),
        "method": recipe.method,
        "lora": recipe.lora.method,
        "targets": str(recipe.lora.targets),
        "quantization": str(recipe.quantization),
    }
    limits = _LIMITS[_precision(model, recipe)]
    if not is_proven("train", fingerprint, **facts):
        samples = _samples(tokens)
        with _untouched(model):
            fault = _fault(model, samples, support, limits)
            if fault and support.mode == "batched":
                use_single_rows(model)
                fault = _fault(model, samples, row_support(model), limits)
        if fault:
            raise IncompatibleBase(
                f"{bare_model(model).config.model_type} cannot be trained right: {fault}. Use another base."
            )
        if row_support(model).mode == support.mode:
            remember("train", fingerprint, **facts)
    found = row_support(model)
    return () if found.mode == "batched" else (f"rows: one sample each ({found.reason})",)


def _samples(tokens: Sequence[int]) -> list[Sample]:
    """Return two short samples of such tokens that share the first ones, and train the others.

    Their order is random: on text that an adapter knows by heart, losses and gradients would be as small as rounding.
    """
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    tokens = [tokens[place] for place in order.tolist()]
    first = [tokens[place % len(tokens)] for place in range(_PREFIX)]
    texts, place = [], _PREFIX
    for length in _LENGTHS:
        own = [tokens[(place + number) % len(tokens)] for number in range(length - _PREFIX)]
        texts.append((*first, *own))
        place += len(own)
    return [Sample(text, tuple(number >= _PREFIX for number in range(len(text)))) for text in texts]


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Restore mode, random numbers, gradients, buffers and windows at the end; windows are short in the block."""
    config = bare_model(model).config.get_text_config()
    windows = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        try:
            model.eval()
            for name, size in windows.items():
                if size:
                    setattr(config, name, min(size, _WINDOW))
            yield
        finally:
            for name, size in windows.items():
                if size:
                    setattr(config, name, size)
            for module, mode in was_training.items():
                module.training = mode
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            for parameter in trainable(model):
                parameter.grad = None


def _precision(model: Any, recipe: Recipe) -> str:
    """Return the dtype that layers compute in at worst: LLM.int8 rounds by the outliers of all rows."""
    return "int8" if recipe.quantization.kind == "int8" else str(model.dtype).removeprefix("torch.")


def _fault(model: Any, samples: Sequence[Sample], support: Support, limits: tuple[float, float]) -> str:
    """Return what is wrong with rows of that support, else nothing."""
    try:
        alone = torch.cat([_own_losses(model, sample) for sample in samples])
        if not alone.isfinite().all():
            return "the loss of a sample is NaN or Inf (compute_dtype = float32 may help)"
        together = _row_losses(model, samples, support)
        with torch.no_grad():
            early = _own_losses(model, samples[0], samples[0].tokens[:-1])
        found = {
            "what a token predicts depends on those behind it, or on the passes before": (
                _relative(early, alone[: len(early)]),
                limits[0],
            ),
            "samples change each other's loss": (_relative(together, alone), limits[0]),
            "samples change each other's gradients": (_gradient_error(model, together, alone), limits[1]),
        }
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise
        return f"a training step of it fails ({error})"
    for what, (difference, limit) in found.items():
        if not difference <= limit:
            return f"{what} (by {difference:.2g} of what the model gives it alone; {limit} would be rounding)"
    return ""


def _own_losses(model: Any, sample: Sample, given: Sequence[int] | None = None) -> torch.Tensor:
    """Return the losses of a sample's trained tokens as the model itself computes them, given all or some tokens."""
    ids = torch.tensor([given or sample.tokens], device=model.device)
    # A soft prompt adds logits before those of the sample.
    logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :]
    places = torch.tensor([place for place, mark in enumerate(sample.trained) if mark], device=model.device)
    targets = torch.tensor(sample.tokens, device=model.device)[places]
    return cross_entropy(logits[places - 1].float(), targets, reduction="none")


def _row_losses(model: Any, samples: Sequence[Sample], support: Support) -> torch.Tensor:
    rows = [[samples[place] for place in places] for places in rows_of(support, samples)]
    return torch.cat([token_losses(model, pack(row, device=model.device)) for row in rows])


def _gradient_error(model: Any, together: torch.Tensor, alone: torch.Tensor) -> float:
    """Return the norm of the difference of the gradients, relative to theirs; no second copy of them is kept."""
    parameters = trainable(model)
    together.sum().backward()  # type: ignore[no-untyped-call]
    size = _norm(parameters)
    (-alone.sum()).backward()  # type: ignore[no-untyped-call]
    error = _norm(parameters) / size if size else float("inf")
    for parameter in parameters:
        parameter.grad = None
    return error


def _norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    norms = [parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.detach() - other.detach()).norm() / other.detach().norm())
