"""Sample a model's answers to fixed prompts during training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from adapterhub.chat_template import encode_chat
from adapterhub.package.run_record import SampleAnswer
from adapterhub.probe import generate_greedily
from train.objectives.evaluation import eval_mode

NUM_TOKENS = 40
"""Maximum answer length, in tokens."""


class FixedPrompts:
    """Prompts that are answered greedily, so that no random state changes and models can be compared.

    The base's own generation settings, such as a penalty, do not apply. An answer ends at the first of the `stop`
    strings, as in a server.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Any, *, stop: Sequence[str] = ()) -> None:
        self._prompts = tuple(prompts)
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        self._rows: list[list[int]] = [
            encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in self._prompts
        ]

    def answer(self, model: Any) -> list[SampleAnswer]:
        """Return the model's current answer to each prompt."""
        if not self._rows:
            return []
        batches = [[row] for row in self._rows] if _is_soft_prompt(model) else [self._rows]
        with eval_mode(model), warnings.catch_warnings():
            # PEFT's soft prompts count positions themselves, and warn about those given.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            texts = [text for batch in batches for text in self._generate(model, batch)]
        return [
            SampleAnswer(prompt=prompt, text=self._ended(text).strip())
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]

    def _generate(self, model: Any, rows: list[list[int]]) -> list[str]:
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        out = generate_greedily(model, inputs, num_tokens=NUM_TOKENS, pad_token_id=pad)
        found: list[str] = self._tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return found

    def _ended(self, text: str) -> str:
        return text[: min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=len(text))]


def _is_soft_prompt(model: Any) -> bool:
    """Return whether the model has a soft prompt.

    Its rows must not be padded: PEFT ignores given positions and counts from the padding on.
    """
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.is_prompt_learning
