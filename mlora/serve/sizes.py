"""What a model's config says of lengths, ends and memory."""

from __future__ import annotations

import os
from typing import Any

TOKENS = 1024  # of an answer with its prompt, for which there is room by default


def text_config(model: Any) -> Any:
    """Of the part of a model that reads and writes tokens."""
    return model.config.get_text_config()


def longest(config: Any) -> int:
    """Tokens of the longest sequence that the model has positions for; a large number if it does not say."""
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def ends(model: Any) -> frozenset[int]:
    """The tokens that end an answer, of its generation config."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([found] if isinstance(found, int) else found or ())


def default_tokens(model: Any, running: int) -> int:
    """`TOKENS` for each of `running`, or what a quarter of the free memory has room for, but one sequence of the
    model's length at least; see `Engine`."""
    config = text_config(model)
    length = longest(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = config.num_hidden_layers * 2 * heads * width * model.dtype.itemsize
    room = _free(model.device) // 4 // token
    wanted = running * min(TOKENS, length)
    return max(min(wanted, room), min(length, room), 1)


def _free(device: Any) -> int:
    """Bytes."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
