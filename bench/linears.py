"""The least time that a model's linears can take on this processor, beside the library's."""

from __future__ import annotations

from typing import Any

import torch
from common import multiply_adds, seconds
from torch import Tensor, nn


class Linears:
    """The linears of a model by themselves: the library's time, and the least of any way.

    Args:
        stream: bytes a second of a streaming read.
    """

    def __init__(self, model: Any, stream: float) -> None:
        self.weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self.head = model.get_output_embeddings().weight
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
