"""Tiny random bases and adapters."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

from adapterhub.adapter import StoredBase

TINY_VOCABULARY = 4096
"""tokens of the tiny base: a twelfth of SmolLM2's, which take longer to read than most tests to run"""


def make_tiny_base(folder: Path, tokenizer_from: StoredBase, *, layers: int, seed: int, hidden: int = 64) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough for greedy decoding without near-ties
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(tokenizer_from.path, folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_peft_adapter(folder: Path, base: StoredBase, *, rank: int, seed: int, **options: object) -> None:
    """A LoRA with random A and B, so that it changes every answer; saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    targets = options.pop("target_modules", "all-linear")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    peft_model.save_pretrained(folder, save_embedding_layers=False)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Write SmolLM2's tokenizer with its first tokens only: any text is still spelt, in more of them."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    model = tokenizer["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < TINY_VOCABULARY}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    model |= {"vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
