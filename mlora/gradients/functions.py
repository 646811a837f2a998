"""The products of layers under adapters that are being trained, as autograd records them.

With h the gradient of y = G base(x) + B^T v + c, v = s A x in fp32, and V = s B h, of one row of one adapter:

    x       base^T(G h) + A^T V     the second term is `apply_` on a table with A and B exchanged, which makes V too
    A, B    sum V x^T, sum v h^T    over the adapter's tokens
    bias    s sum h

What is kept for the backward pass is x, once for all layers that read it, and v, a few numbers a token. The adapters
are read where they lie by then; if they have been changed or deleted meanwhile, the backward pass is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arena.bits import GAIN
from ..ops import dispatch, reference
from .recorded import Site


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, kblock: int) -> Tensor:
    """`dispatch.linear` of a base that is not trained itself, differentiable with respect to x and the site's
    parameters."""
    y: Tensor = _Linear.apply(x, weight, bias, site, kblock, *site.parameters)
    return y


def add(y: Tensor, base: Tensor | None, x: Tensor, site: Site) -> Tensor:
    """`reference.apply`, differentiable with respect to y, base, x and the site's parameters."""
    out: Tensor = _Added.apply(y, base, x, site, *site.parameters)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, kblock: int, *parameters: Tensor
    ) -> Tensor:
        v = site.kept(x)
        y = dispatch.linear_keep(x, weight, bias, v, site.arena, site.table, site.words, kblock)
        _keep(ctx, site, x, v, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        x, v, weight = ctx.saved_tensors
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            h = h.contiguous()
            dx = None
            if ctx.needs_input_grad[0]:
                through = h if (gained := _gained(h, site)) is None else h + gained
                dx = through @ weight
            gradients = _backward(site, dx, h, x, v, ctx.shape, ctx.needs_input_grad[5:])
        return dx, None, None, None, None, *gradients


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, base: Tensor | None, x: Tensor, site: Site, *parameters: Tensor) -> Tensor:
        v, out = site.kept(x), y.clone()
        dispatch.apply_keep_(out, v, base, x, site.arena, site.table, site.words)
        _keep(ctx, site, x, v)
        ctx.from_y = base is None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        x, v = ctx.saved_tensors
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            h = h.contiguous()
            gained = _gained(h, site)
            dy = h if gained is None or not ctx.from_y else h + gained
            dx = h.new_zeros(ctx.shape) if ctx.needs_input_grad[2] else None
            gradients = _backward(site, dx, h, x, v, ctx.shape, ctx.needs_input_grad[4:])
        return dy, gained if ctx.needs_input_grad[1] else None, dx, None, *gradients


def _keep(ctx: Any, site: Site, x: Tensor, v: Tensor, *others: Tensor) -> None:
    ctx.site, ctx.made, ctx.shape = site, site.training.made(site.plan), x.shape
    ctx.save_for_backward(x if site.parts else None, v, *others)


def _backward(
    site: Site,
    dx: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    v: Tensor,
    shape: tuple[int, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Add A^T V to `dx`, if that is wanted; the gradients of the site's parameters, None of those not `needed`."""
    where = (site.arena, site.exchanged, site.words)
    if dx is None and not any(needed):
        return [None] * len(needed)
    big = torch.empty_like(v)
    dispatch.apply_keep_(h.new_zeros(shape) if dx is None else dx, big, None, h, *where)
    if x is None:
        return []
    flat = torch.empty(site.size, dtype=v.dtype, device=v.device)
    if not h.numel():
        flat.zero_()
    dispatch.rank_gradients_(flat, big, x, site.a, *where)
    dispatch.rank_gradients_(flat, v, h, site.b, site.arena, site.table, site.words)
    if site.biases:
        sums = _shift_gradients(h, site, v.dtype)
        for slot, scale, place in site.biases:
            flat[place.offset : place.offset + place.shape[0]] = sums[slot] * scale if slot in sums else 0.0
    pairs = zip(site.gradients(flat), needed, strict=True)
    return [gradient if wanted else None for gradient, wanted in pairs]


def _gained(h: Tensor, site: Site) -> Tensor | None:
    """sum_i w_i gain_i * h over the terms of each row's recipe, (..., out); None where no row has a gain."""
    flat, out = h.flatten(0, -2), None
    width = h.shape[-1]
    if not site.plan.touches[site.index] & GAIN:
        return None
    for route in reference.routes(site.words, site.table, len(flat)):
        for t in route.terms:
            if t.gain >= 0:
                out = torch.zeros_like(flat, dtype=reference.wide(h.dtype)) if out is None else out
                gain = site.arena[t.gain : t.gain + width].to(out.dtype) * t.weight
                out[route.tokens] += flat[route.tokens].to(out.dtype) * gain
    return None if out is None else out.to(h.dtype).view(h.shape)


def _shift_gradients(h: Tensor, site: Site, dtype: torch.dtype) -> dict[int, Tensor]:
    """Slot -> the sum of its weight times h over its rows' tokens."""
    flat = h.flatten(0, -2)
    sums: dict[int, Tensor] = {}
    for route in reference.routes(site.words, site.table, len(flat)):
        total = flat[route.tokens].to(dtype).sum(0)
        for t in route.terms:
            sums[t.slot] = sums[t.slot] + t.weight * total if t.slot in sums else t.weight * total
    return sums
