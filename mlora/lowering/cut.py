"""How tensor parallelism has split a module over processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """How a module is split, and which part this process has.

    Args:
        axis: "outputs" or "inputs"; "experts", of fused ones, each of which one process has whole; "" where nothing is
            served there, `why`.
        spans: the start and the end of what this process has of that axis, one behind another; several where a module
            is two in one (a fused gate and up projection).
        rank, world: which of how many processes this is.
    """

    axis: str
    spans: Spans = ()
    rank: int = 0
    world: int = 1
    why: str = ""

    @property
    def width(self) -> int:
        """How much of the axis this process has."""
        return sum(end - start for start, end in self.spans)

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor whose dimension `dim` is the axis."""
        parts = [tensor.narrow(dim, start, end - start) for start, end in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
