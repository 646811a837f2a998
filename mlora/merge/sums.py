"""The weighted sum of deltas, which is a delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..lowering.delta import Delta, Matrix
from ..lowering.turn import Turn

# How much of a sum's terms, as a share of their sizes, fp64 may leave of one that is zero.
_LEFT = 1e-12


def without_cancelled(delta: Delta) -> Delta:
    """The same delta; without rank rows where these add up to zero, as those of an adapter and its negative do.

    B^T (A x) of one random x tells, since a matrix that is not zero maps almost none to zero. Whole matrices are left
    as they are.
    """
    if delta.a is None or delta.b is None:
        return delta
    a, b = delta.a.double(), delta.b.double()
    x = torch.randn(a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, size = b.t() @ (a @ x), b.t().abs() @ (a.abs() @ x.abs())
    return replace(delta, a=None, b=None) if bool((left.abs() <= _LEFT * size).all()) else delta


def weighted_sum(terms: Sequence[tuple[Delta, float]], where: str) -> Delta:
    """The exact weighted sum, by concatenation. The weights go to A, as in PEFT's `cat`. With a whole matrix among the
    terms it is one.

    Raises:
        MergeError: turns of blocks of different sizes, whose sum is no turn.
    """
    matrix = Matrix.of(_products(terms)) if any(d.matrix is not None for d, _ in terms) else None
    ranked = [(d, w) for d, w in terms if matrix is None and d.a is not None and d.b is not None]
    a = torch.cat([d.a.float() * w * d.scale for d, w in ranked if d.a is not None]) if ranked else None
    b = torch.cat([d.b.float() for d, _ in ranked if d.b is not None]) if ranked else None

    def weighted(part: str) -> Tensor | None:
        found = [w * getattr(d, part).float() for d, w in terms if getattr(d, part) is not None]
        return torch.stack(found).sum(0) if found else None

    def turned(part: str) -> Turn | None:
        found = [(turn, w) for d, w in terms if (turn := getattr(d, part)) is not None]
        if len({turn.shape for turn, _ in found}) > 1:
            raise errors.MergeError(
                f"module {where}: turns of blocks of different sizes are served in weighted entries, and not in one "
                f"adapter"
            )
        return Turn(sum(w * turn.values.float() for turn, w in found), found[0][0].stride) if found else None

    # A sum's relative error is bounded by its terms': what is known of it.
    error = max((d.error for d, _ in terms), default=0.0)
    gains: dict[str, Any] = {part: weighted(part) for part in ("gain", "in_gain", "shift")}
    return Delta(a, b, matrix=matrix, **gains, turn=turned("turn"), in_turn=turned("in_turn"), error=error)


def _products(terms: Sequence[tuple[Delta, float]]) -> Tensor:
    """(out, in), the weighted sum of all B^T A and D."""
    total: Tensor | None = None
    for delta, weight in terms:
        if (product := delta.product()) is not None:
            total = product.mul_(weight) if total is None else total.add_(product, alpha=weight)
    assert total is not None
    return total
