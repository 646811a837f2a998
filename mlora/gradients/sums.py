"""Sums over the tokens of each adapter: the gradients of gains and shifts."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from .recorded import Site


def sums(
    left: Tensor, right: Tensor | None, site: Site, slots: Collection[int], dtype: torch.dtype
) -> dict[int, Tensor]:
    """Of each of `slots`, the sum over the tokens t of its rows of w left[t] right[t], or of w left[t]: (width,) in
    `dtype`, with w its weight in the row's recipe.

    Shapes: left and right (..., width), of the plan's rows.
    """
    flat, given = left.flatten(0, -2), None if right is None else right.flatten(0, -2)
    found: dict[int, Tensor] = {}
    for tokens, weights in site.routes(len(flat)):
        terms = [(slot, weight) for slot, weight in weights if slot in slots]
        if not terms:
            continue
        whole = len(tokens) == len(flat)  # in whatever order, which is the same for both
        total = (flat if whole else flat[tokens]).to(dtype)
        if given is not None:
            total = total * (given if whole else given[tokens])
        total = total.sum(0)
        for slot, weight in terms:
            found[slot] = found[slot] + weight * total if slot in found else weight * total
    return found
