"""Prompts through a chat model, each row under its own adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

Entry: TypeAlias = str | Mapping[str, float] | None


def encode(tokenizer: Any, prompts: list[str], raw: bool = False) -> Any:
    """A left-padded batch; each prompt is a user's message in the chat template unless `raw`."""
    if not raw:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: pass --raw to feed prompts as they are")
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(prompts, add_special_tokens=raw, return_tensors="pt", padding=True, padding_side="left")


def complete(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    entries: list[Entry],
    max_new_tokens: int,
    raw: bool = False,
) -> list[str]:
    """The greedy completion of each prompt under its entry, as one batch."""
    inputs = encode(tokenizer, prompts, raw).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, adapter_names=entries, max_new_tokens=max_new_tokens, do_sample=False)
    return list(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
