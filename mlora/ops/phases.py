"""`apply_` in two phases, in plain torch: between them, processes that share a module's rank rows add up what each has
made of its part of the inputs. See `reference`."""

from __future__ import annotations

from torch import Tensor

from .reference import factor, part_at, routes, tokens_of, wide
from .training import split


def shrink_(v: Tensor, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """The first phase: v <- w_i scale_i A_i x of each term that has rank rows, as `training.apply_keep_` leaves it.

    Shapes: v 1-D, fp32 (fp64 of fp64): route after route of the plan, (tokens of the route, ranks of its terms side by
    side); x (..., in), arena (elements,), table and plan as in `layout`.
    """
    rows = tokens_of("x", x)
    found = routes(plan, table, len(rows))
    parts = split(v, found)
    for route in found:
        own = rows[route.tokens].to(wide(x.dtype))
        for t in route.terms:
            if t.rank:
                a = factor(arena, t.a, t, rows.shape[1], own.dtype)
                next(parts).copy_((own if a is None else own @ a.T) * (t.weight * t.scale))


def expand_(y: Tensor, v: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """The second phase: y <- y + (sum_i w_i gain_i) * y + sum_i B_i^T v_i + sum_i w_i shift_i over the terms i of each
    row's recipe, in place. `shrink_` and this leave in y the bits that `apply_` does. Rows without a route keep theirs.

    Shapes: y (..., out), whose rows may be apart; v as in `shrink_`; arena, table and plan as in `layout`.
    """
    rows = tokens_of("y", y)
    out, width = rows.to(wide(y.dtype)), rows.shape[1]
    found = routes(plan, table, len(rows))
    parts = split(v, found)
    for route in found:
        own = out[route.tokens]
        delta = own.new_zeros(own.shape)
        for t in route.terms:
            if t.rank:
                b, part = factor(arena, t.b, t, width, out.dtype), next(parts).to(out.dtype)
                delta = delta + (part if b is None else part @ b)
            if t.shift >= 0:
                delta = delta + t.weight * part_at(arena, t.shift, width, t.slot, out.dtype)
            if t.gain >= 0:
                delta = delta + t.weight * part_at(arena, t.gain, width, t.slot, out.dtype) * own
        out = out.index_copy(0, route.tokens, own + delta)
    y.copy_(out.view(y.shape))
