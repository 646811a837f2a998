"""The least time that a model's linears, and its attention of decode steps, can take on this processor, beside the
libraries'."""

from __future__ import annotations

from typing import Any

import torch
from common import multiply_adds, seconds
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class Linears:
    """The linears of a model by themselves: the library's time, and the least of any way.

    Args:
        stream: bytes a second of a streaming read.
    """

    def __init__(self, model: Any, stream: float) -> None:
        self.weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self.head = model.get_output_embeddings().weight
        self.config = model.config
        self.stream, self.peak = stream, multiply_adds(dtype=self.head.dtype)

    def calls(self, phase: str, ids: Tensor, new: int) -> dict[tuple[int, int], int]:
        """(tokens, tokens of the head) -> how many such calls of the model a phase makes."""
        rows = len(ids)
        prompt, step = (ids.numel(), rows), (rows, rows)
        return {"decode step": {step: 1}, "prefill": {prompt: 1}, "generate": {prompt: 1, step: new - 1}}[phase]

    def seconds(self, tokens: int, last: int) -> float:
        """Of the library's products."""
        width = max(weight.shape[1] for weight in self.weights)
        x = torch.randn(tokens, width).to(self.head.dtype)
        read = {weight.shape[1]: x[:, : weight.shape[1]].contiguous() for weight in self.weights}

        def products() -> None:
            for weight in self.weights:
                own = read[weight.shape[1]]
                nn.functional.linear(own[:last] if weight is self.head else own, weight)

        products()
        return min(seconds(products) for _ in range(3))

    def least(self, tokens: int, last: int, rank: int, adapter_bytes: int) -> float:
        """What of two takes longer, for each weight: to read it once, or to multiply; and so for all adapters."""
        spent, added = 0.0, 0
        for weight in self.weights:
            count = last if weight is self.head else tokens
            spent += max(weight.nbytes / self.stream, count * weight.numel() / self.peak)
            added += 0 if weight is self.head else count * rank * sum(weight.shape)
        return spent + max(adapter_bytes / self.stream, added / self.peak)

    def attention(self, phase: str, ids: Tensor, new: int) -> tuple[float, float]:
        """Of a phase's decode steps: what transformers' attention takes, and what reading the caches does. The steps of
        `generate` count as so many of their mean length."""
        rows, prompt = ids.shape
        made = {"decode step": (1, prompt + 1), "prefill": (0, 1), "generate": (new - 1, prompt + new // 2)}
        steps, keys = made[phase]
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        layer = nn.Module()
        layer.num_key_value_groups = heads // kv_heads
        query, key, value = (
            torch.randn(rows, count, length, width).to(self.head.dtype)
            for count, length in ((heads, 1), (kv_heads, keys), (kv_heads, keys))
        )

        def step() -> None:
            for _ in range(config.num_hidden_layers):
                sdpa_attention_forward(layer, query, key, value, None)

        taken = min(seconds(step) for _ in range(3)) if steps else 0.0
        return steps * taken, steps * config.num_hidden_layers * (key.nbytes + value.nbytes) / self.stream
