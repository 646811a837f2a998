"""The products of layers under adapters that are being trained, as autograd records them.

With h the gradient of y = G base(x) + B^T v + c, v = s A x in fp32, and V = s B h, of one row of one adapter:

    x       base^T(G h) + A^T V     the second term is `apply_` on a table with A and B exchanged, which makes V too
    A, B    sum V x^T, sum v h^T    over the adapter's tokens
    bias    s sum h
    DoRA    g times that of B; sum h (base(x) - bias + s B A x) / n for m, where g = m / n with n = |W + s B A|

What is kept for the backward pass is x, once for all layers that read it, and v, a few numbers a token. The adapters
are read where they lie by then; if they have been changed or deleted meanwhile, the backward pass is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


def add(y: Tensor, base: Tensor | None, x: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """`reference.apply`, differentiable with respect to y, base, x and the site's parameters. `bias`: the module's."""
    out: Tensor = _Added.apply(y, base, x, bias, site, *site.parameters)
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
                dx = _through(h, site) @ weight
            base = (F.linear(x, weight), None) if site.magnitudes and any(ctx.needs_input_grad[5:]) else None
            gradients = _backward(site, dx, h, x, v, base, ctx.shape, ctx.needs_input_grad[5:])
        return dx, None, None, None, None, *gradients


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, base: Tensor | None, x: Tensor, bias: Tensor | None, site: Site, *parameters: Tensor
    ) -> Tensor:
        v, out = site.kept(x), y.clone()
        dispatch.apply_keep_(out, v, base, x, site.arena, site.table, site.words)
        ctx.from_y, ctx.bias = base is None, bias
        _keep(ctx, site, x, v, *([y if base is None else base] if site.magnitudes else []))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        x, v, *bases = ctx.saved_tensors
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            h = h.contiguous()
            through = _through(h, site)
            dx = h.new_zeros(ctx.shape) if ctx.needs_input_grad[2] else None
            base = (*bases, ctx.bias) if bases else None
            gradients = _backward(site, dx, h, x, v, base, ctx.shape, ctx.needs_input_grad[5:])
        if ctx.from_y:
            return through, None, dx, None, None, *gradients
        return h, through - h if ctx.needs_input_grad[1] else None, dx, None, None, *gradients


def _keep(ctx: Any, site: Site, x: Tensor, v: Tensor, *others: Tensor) -> None:
    ctx.site, ctx.made, ctx.shape = site, site.training.made(site.plan), x.shape
    ctx.save_for_backward(x if site.parts else None, v, *others)


def _backward(
    site: Site,
    dx: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    v: Tensor,
    base: tuple[Tensor, Tensor | None] | None,
    shape: tuple[int, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Add A^T V to `dx`, if that is wanted; the gradients of the site's parameters, None of those not `needed`. `base`:
    where there are magnitudes base(x), and the bias in it, if one is."""
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
        sums = _sums(h, None, None, site, v.dtype)
        for slot, place in site.biases:
            flat[place.offset : place.offset + place.shape[0]] = sums[slot] * site.parts[slot].scale
    if base is not None:
        sums = _sums(h, *base, site, v.dtype)
        for slot, place in site.magnitudes:
            b, measured = site.parts[slot].b.detach(), site.trained[slot].measured[site.index]
            gradient = flat[site.b[slot] :][: b.numel()].view(b.shape[1], b.shape[0])  # of g B
            size = place.shape[0]
            flat[place.offset : place.offset + size] = (sums[slot] + (gradient * b.t()).sum(0)) / measured.norm
            gradient *= measured.gain
    pairs = zip(site.gradients(flat), needed, strict=True)
    return [gradient if wanted else None for gradient, wanted in pairs]


def _through(h: Tensor, site: Site) -> Tensor:
    """h (1 + sum_i w_i gain_i) by the terms of each row's recipe: the gradient of the base's output."""
    if not site.plan.touches[site.index] & GAIN:
        return h
    return dispatch.scale_input(h, site.arena, site.exchanged, site.words)


def _sums(h: Tensor, base: Tensor | None, bias: Tensor | None, site: Site, dtype: torch.dtype) -> dict[int, Tensor]:
    """Slot -> the sum of its weight times h, or h * (base - bias), over its rows' tokens; h and base (..., out)."""
    flat, given = h.flatten(0, -2), None if base is None else base.flatten(0, -2)
    sums: dict[int, Tensor] = {}
    for route in reference.routes(site.words, site.table, len(flat)):
        whole = len(route.tokens) == len(flat)  # in whatever order, which is the same for both
        own = (flat if whole else flat[route.tokens]).to(dtype)
        if given is None:
            total = own.sum(0)
        else:
            total = (own * (given if whole else given[route.tokens])).sum(0)
            total = total if bias is None else total - bias.to(dtype) * own.sum(0)
        for t in route.terms:
            sums[t.slot] = sums[t.slot] + t.weight * total if t.slot in sums else t.weight * total
    return sums
