"""Block-diagonal matrices that turn an input before the base reads it, or an output of the base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import reference


@dataclass(frozen=True, eq=False)
class Turn:
    """T - I of a square T whose blocks are `size` elements, `stride` apart (`ops.layout` says which).

    Args:
        values: (size, width): in column n, what element n of T v takes of each element of its block.
    """

    values: Tensor
    stride: int = 1

    @classmethod
    def of_blocks(cls, matrices: Tensor, stride: int = 1) -> Turn:
        """From the blocks of T - I, (blocks, size, size), those of neighbouring elements first."""
        size = matrices.shape[-1]
        blocks = matrices.reshape(-1, stride, size, size)  # [span, lane, k, j]
        return cls(blocks.permute(3, 0, 2, 1).reshape(size, -1), stride)

    def blocks(self) -> Tensor:
        """Undo `of_blocks`: (blocks, size, size)."""
        return self._cut.permute(1, 3, 2, 0).flatten(0, 1)

    @property
    def size(self) -> int:
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """What two turns that can be added have in common."""
        return self.size, self.stride

    @property
    def _cut(self) -> Tensor:
        return self.values.reshape(self.size, -1, self.size, self.stride)  # [j, span, k, lane]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Turn) and self.stride == other.stride and torch.equal(self.values, other.values)

    __hash__ = None  # type: ignore[assignment]

    @property
    def diagonal(self) -> Tensor:
        """(width,), of T - I."""
        return self._cut.diagonal(dim1=0, dim2=2).movedim(-1, 1).flatten()

    def times(self, x: Tensor, transposed: bool = False) -> Tensor:
        """(T - I) x along the last dimension, or (T - I)^T x, in x's dtype."""
        return reference.turned(x, self.values.to(x.dtype), self.stride, transposed)
