"""The token with which a chat template ends an assistant's turn, and at which a server must stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapterhub.chat_template import encode_chat

_EXCHANGE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokenizer's special tokens, added ones included."""
    return frozenset(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def end_of_turn(tokenizer: Any, template: str | None) -> int | None:
    """Return the id of the first special token after an answer that `template` renders (None: the tokenizer's own).

    White space may stand before it. Return None where there is no template, where it cannot render a question and its
    answer, or where ordinary text ends the turn: then only a stop string can end an answer.
    """
    template = template or tokenizer.chat_template
    if not template:
        return None
    try:
        tokens = encode_chat(tokenizer, _EXCHANGE, template=template)
    except Exception:  # a template is a program, and may fail in any way
        return None
    special, found = special_ids(tokenizer), None
    for token in reversed(tokens):
        if token in special:
            found = token
        elif str(tokenizer.decode([token])).strip():
            break
    return found


def other_ends(folder: Path, tokenizer: Any) -> list[str]:
    """Return a note where a base's generation config does not end answers as its chat template does.

    `folder` is the base's, `tokenizer` has the chat template of the run.
    """
    try:
        configured = json.loads((folder / "generation_config.json").read_bytes()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    end = end_of_turn(tokenizer, None)
    if end is None or not ids or end in ids:
        return []
    named = ", ".join(str(tokenizer.decode([token])) for token in ids)
    return [
        f"the base's generation config ends answers at {named}, the chat template at {tokenizer.decode([end])}: "
        "servers stop at all of them"
    ]
