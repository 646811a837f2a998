"""Prompts through a chat model, each row under its own adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from mlora.errors import CapacityError

Entry: TypeAlias = str | Mapping[str, Any] | None


def encode(tokenizer: Any, prompt: str | list[dict[str, str]], raw: bool = False) -> list[int]:
    """The tokens of a user's message, or of a chat, in the chat template; with `raw` of the prompt as it is.

    Raises ValueError if the tokenizer has no chat template, or what its template raises.
    """
    if raw:
        return list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: pass --raw to feed prompts as they are")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 (rows, longest), padded on the left."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def complete(
    model: Any, rows: Sequence[Sequence[int]], entries: Sequence[Entry], pad: int, **options: Any
) -> list[list[int]]:
    """The tokens that follow each row under its entry, up to the end of its text.

    The rows are one batch, or where their adapters do not fit on the device at once, as few as that takes by halving.

    Args:
        pad: a token that every row's embedding has. `options`: of `model.generate`.
    """
    inputs = padded(rows, pad, model.device)
    try:
        with torch.inference_mode():
            output = model.generate(**inputs, adapter_names=list(entries), pad_token_id=pad, **options)
    except CapacityError:
        if len(rows) == 1:
            raise
        half = len(rows) // 2
        parts = (slice(half), slice(half, None))
        return [row for part in parts for row in complete(model, rows[part], entries[part], pad, **options)]
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in new]
