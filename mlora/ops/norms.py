"""Norms of the rows of a weight with a low-rank change, which DoRA divides by."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import wide


def row_norms(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """|W + scale B A| of each row, in a's dtype: (out,).

    Shapes: weight (out, in), of any floating dtype; b (out, rank) and a (rank, in), fp32 (fp64 beside an fp64 weight).
    """
    if b.shape != (weight.shape[0], a.shape[0]) or a.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"mlora: weight must be (out, in), b (out, rank) and a (rank, in), are {tuple(weight.shape)}, "
            f"{tuple(b.shape)} and {tuple(a.shape)}"
        )
    if not a.dtype == b.dtype == wide(a.dtype):
        raise RuntimeError(f"mlora: a and b must be float32, are {a.dtype} and {b.dtype}")
    return torch.linalg.vector_norm(torch.addmm(weight.to(a), b, a, alpha=scale), dim=1)
