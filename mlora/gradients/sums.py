"""Sums over the tokens of each adapter: the gradients of gains and shifts."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..ops import reference
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
    for route in reference.routes(site.words, site.table, len(flat)):
        terms = [t for t in route.terms if t.slot in slots]
        if not terms:
            continue
        whole = len(route.tokens) == len(flat)  # in whatever order, which is the same for both
        total = (flat if whole else flat[route.tokens]).to(dtype)
        if given is not None:
            total = total * (given if whole else given[route.tokens])
        total = total.sum(0)
        for t in terms:
            found[t.slot] = found[t.slot] + t.weight * total if t.slot in found else t.weight * total
    return found
