"""What training adds to the operators, in plain torch: products that leave what their backward pass needs, the
gradients of rank rows, and sums over tokens. See `reference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Route, added, routes, tokens_of, wide


def apply_keep_(
    y: Tensor, v: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    """`reference.apply_`, which also leaves in `v` what the backward pass needs: w_i scale_i A_i x of each term that
    has rank rows.

    Shape: v 1-D, fp32 (fp64 of fp64): route after route of the plan, (tokens of the route, ranks of its terms side by
    side).
    """
    rows = tokens_of("y", y).to(wide(y.dtype))
    b = rows if base is None else tokens_of("base", base)
    y.copy_(added(tokens_of("x", x), rows, b, arena, table, plan, _parts(v, plan, table, len(rows))).view(y.shape))


def linear_keep(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    arena: Tensor,
    table: Tensor,
    plan: Tensor,
    kblock: int,
) -> Tensor:
    """`reference.linear`, which also leaves in `v` what `apply_keep_` does; not differentiable."""
    if kblock == 0:
        y = F.linear(x, weight, bias)
        apply_keep_(y, v, None, x, arena, table, plan)
        return y
    rows = tokens_of("x", x)
    dtype = wide(x.dtype)
    product = F.linear(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    out = added(rows, product, product, arena, table, plan, _parts(v, plan, table, len(rows)))
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def rank_gradients_(
    to: Tensor, v: Tensor, rows: Tensor, offsets: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    """The gradients of rank rows. Of each slot in the plan that has rank rows, tokens and an offset:

        to[offsets[slot]:][: rank * width], as (rank, width),  <-  sum_t v[t, j] * rows[t, n]

    over the tokens t of all of the slot's terms. What else is in `to` stays. With the v of `apply_keep_` and the
    gradient of its y that is the gradient of B; with the v of the same call on a table in which A and B are exchanged
    and on y's gradient in x's place, and with x, it is that of A.

    An element's bits depend on the tokens of the slot's own rows, and on nothing else.

    Shapes: to 1-D and v as `apply_keep_` has it, both fp32 (fp64 of fp64); rows (..., width) in the arena's dtype;
    offsets int64 (slots,), -1 where no gradient is wanted; arena, table and plan as in `layout`.
    """
    flat = tokens_of("rows", rows)
    width, begun = flat.shape[1], set()
    if offsets.dim() != 1 or len(offsets) != len(table) or offsets.dtype != torch.int64:
        raise RuntimeError(f"mlora: offsets must be int64 of {len(table)} slots, is {tuple(offsets.shape)}")
    found = routes(plan, table, len(flat))
    parts = split(v, found)
    for route in found:
        own = flat[route.tokens].to(to.dtype)
        for t in route.terms:
            if not t.rank:
                continue
            part, at = next(parts), int(offsets[t.slot])
            if at < 0 or not len(own):
                continue
            if at + t.rank * width > to.numel():
                raise RuntimeError(
                    f"mlora: the gradient of slot {t.slot}, {t.rank} rank rows of {width} from {at}, is outside of "
                    f"{to.numel()}"
                )
            place = to[at : at + t.rank * width].view(t.rank, width)
            total = part.t().to(to.dtype) @ own
            place.copy_(place + total if t.slot in begun else total)
            begun.add(t.slot)


def column_sums(left: Tensor, right: Tensor | None, tokens: Tensor | None) -> Tensor:
    """sum_t left[t, n] right[t, n], or of left[t, n] without `right`, over all tokens or those of the numbers `tokens`:
    (width,), fp32 (fp64 of fp64).

    Shapes: left and right (..., width), of one dtype; tokens int64 (count,).
    """
    flat = tokens_of("left", left)
    other = None if right is None else tokens_of("right", right)
    if other is not None and (other.shape != flat.shape or other.dtype != flat.dtype):
        raise RuntimeError("mlora: right must be rows as left's")
    flat = (flat if tokens is None else flat[tokens]).to(wide(flat.dtype))
    if other is not None:
        flat = flat * (other if tokens is None else other[tokens])
    return flat.sum(0)


def _parts(v: Tensor, plan: Tensor, table: Tensor, tokens: int) -> Iterator[Tensor]:
    return split(v, routes(plan, table, tokens))


def split(v: Tensor, found: Sequence[Route]) -> Iterator[Tensor]:
    """The part of v, (tokens, rank), of each term that has rank rows, route after route."""
    ranks = [[t.rank for t in route.terms if t.rank] for route in found]
    sizes = [len(route.tokens) * sum(own) for route, own in zip(found, ranks, strict=True)]
    if v.dim() != 1 or v.numel() != sum(sizes):
        raise RuntimeError(f"mlora: v has shape {tuple(v.shape)}, the plan's ranks and tokens take {sum(sizes)}")
    for part, own in zip(v.split(sizes), ranks, strict=True):
        if own:
            yield from part.view(-1, sum(own)).split(own, 1)
