"""Sums over the tokens of each adapter: the gradients of gains and shifts."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..ops import dispatch
from .recorded import Site


def sums(left: Tensor, right: Tensor | None, site: Site, slots: Collection[int]) -> dict[int, Tensor]:
    """Of each of `slots`, the sum over the tokens t of its rows of w left[t] right[t], or of w left[t]: (width,) in
    fp32, or fp64 of that, with w its weight in the row's recipe.

    Shapes: left and right (..., width), of the plan's rows.
    """
    found: dict[int, Tensor] = {}
    if right is not None and right.dtype is not left.dtype:
        dtype = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(dtype), right.to(dtype)
    tokens_in_all = left.numel() // left.shape[-1]
    for tokens, weights in site.routes(tokens_in_all):
        terms = [(slot, weight) for slot, weight in weights if slot in slots]
        if not terms:
            continue
        whole = len(tokens) == tokens_in_all  # in whatever order, which is the same for both
        total = dispatch.column_sums(left, right, None if whole else tokens)
        for slot, weight in terms:
            found[slot] = found[slot] + weight * total if slot in found else weight * total
    return found
