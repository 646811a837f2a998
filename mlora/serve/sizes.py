"""What a model's config says of lengths, ends and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

TOKENS = 1024  # of an answer with its prompt, for which there is room by default


def text_config(model: Any) -> Any:
    """Of the part of a model that reads and writes tokens."""
    return model.config.get_text_config()


class Vocabulary:
    """How many tokens the model's embedding has, and how many scores its head gives."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tokens: int = self._embedding.weight.shape[0]
        self.scores: int = self.tokens if self._head is None else self._head.weight.shape[0]

    def under(self, widths: Mapping[str, int]) -> tuple[int, int]:
        """The same of an entry whose adapters bring others, `Pin.widths`."""
        tokens, scores = self.tokens, self.scores
        for path, width in widths.items():
            module = self._model.get_submodule(path)
            if module is self._embedding:
                tokens = width
            elif module is self._head:
                scores = width
        return tokens, scores


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
