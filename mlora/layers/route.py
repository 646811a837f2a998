"""What each recipe of a plan does to parameters (`target_parameters`), told on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import layout
from ..arena.pack import Packed
from ..plan.plan import Recipe, to_device


class Factors(NamedTuple):
    """One term of a parameter's delta, factor * B A: the offsets of A and B in the arena, in elements, and the row's
    weight times the adapter's scaling."""

    rank: int
    a: int
    b: int
    factor: float


class Route(NamedTuple):
    """Of a plan: the rows that take one recipe, as int64 indices on the device, and the terms of each parameter that
    it changes, by the parameter's number."""

    rows: Tensor
    terms: Mapping[int, tuple[Factors, ...]]


def group_routes(
    recipes: Sequence[Recipe], adapters: Mapping[str, Packed], stacks: Sequence[int], home: int, device: torch.device
) -> tuple[Route, ...]:
    """By recipe: `recipes` has one for each of the plan's rows. One copy to the device, so that layers need none.

    Args:
        adapters: what is packed under each name; resident and pinned, so that it does not move.
        stacks: the numbers of all parameters on the device, which is that of number `home`.
    """
    rows: dict[Recipe, list[int]] = {}
    for row, recipe in enumerate(recipes):
        rows.setdefault(recipe, []).append(row)
    held = {name: _held(packed, stacks, home) for name, packed in adapters.items()}
    order = to_device(np.array([row for own in rows.values() for row in own], dtype=np.int64), device)
    parts = order.split([len(own) for own in rows.values()])
    return tuple(Route(part, _terms(recipe, held)) for recipe, part in zip(rows, parts, strict=True))


def _held(packed: Packed, stacks: Sequence[int], home: int) -> dict[int, tuple[int, int, int, float]]:
    """(rank, A, B, scaling) of each parameter that the adapter changes."""
    rows = packed.rows[stacks, 0]
    scales = rows[:, layout.SCALE].astype(np.uint32).view(np.float32).tolist()
    parts = zip(stacks, rows[:, [layout.RANK, layout.A, layout.B]].tolist(), scales, strict=True)
    shift = packed.shift(home)
    return {
        index: (rank, a if a < 0 else a + shift, b if b < 0 else b + shift, scale)
        for index, (rank, a, b), scale in parts
        if rank
    }


def _terms(
    recipe: Recipe, held: Mapping[str, Mapping[int, tuple[int, int, int, float]]]
) -> dict[int, tuple[Factors, ...]]:
    terms: dict[int, tuple[Factors, ...]] = {}
    for name, weight in recipe:
        weight = float(np.float32(weight))  # as kernels read it
        for index, (rank, a, b, scale) in held[name].items():
            terms[index] = (*terms.get(index, ()), Factors(rank, a, b, weight * scale))
    return terms
