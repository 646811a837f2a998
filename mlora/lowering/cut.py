"""How tensor parallelism has split a module over processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        across: of the other axis, what this process has of the rank rows alone, whose A and B are both split then; ()
            where one of them is whole.
    """

    axis: str
    spans: Spans = ()
    rank: int = 0
    world: int = 1
    why: str = ""
    across: Spans = ()

    @property
    def width(self) -> int:
        """How much of the axis this process has."""
        return sum(end - start for start, end in self.spans)

    @property
    def other(self) -> Cut:
        """How the rank rows are split along the other axis."""
        return replace(self, axis="inputs" if self.axis == "outputs" else "outputs", spans=self.across, across=())

    def sharded(self, width: int) -> Cut:
        """The same, with rank rows that are split along the other axis too, which is so wide; itself where that is
        nothing for one of the processes."""
        each = -(-width // self.world)
        if self.axis not in ("outputs", "inputs") or each * (self.world - 1) >= width:
            return self
        return replace(self, across=((self.rank * each, min((self.rank + 1) * each, width)),))

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor whose dimension `dim` is the axis."""
        parts = [tensor.narrow(dim, start, end - start) for start, end in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
