"""The products of linears under adapters that are being trained, as autograd records them.

With h the gradient of y = G base(U x) + B^T v + c, v = s A x in fp32, and V = s B h, of one row of one adapter:

    x       U base^T(G h) + A^T V     the second term is `apply_` on a table with A and B exchanged, which makes V too
    A, B    sum V x^T, sum v h^T      over the adapter's tokens
    c       sum h
    G, U    sum h base(U x), sum x base^T(G h)

What is kept for the backward pass is x, once for all layers that read it, and v, a few numbers a token; of a DoRA also
y, of which the gradient of its magnitude is made. The adapters
are read where they lie by then; if they have been changed or deleted meanwhile, the backward pass is refused. What the
parameters' gradients are made of these is in `parts.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arena.bits import GAIN as GAINS
from ..ops import dispatch, reference
from .parts import FACTOR_A, GAIN, SHIFT, Found
from .recorded import Site
from .sums import sums


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, kblock: int) -> Tensor:
    """`dispatch.linear` of a base that is not trained itself, differentiable with respect to x and the site's
    parameters."""
    y: Tensor = _Linear.apply(x, weight, bias, site, kblock, *site.parameters)
    return y


def add(
    y: Tensor,
    base: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    site: Site,
    drop: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`reference.apply`, differentiable with respect to y, base, x and the site's parameters. `bias`: the module's.
    `drop`: places and odds, by which the adapters read `dropout.drop` of x."""
    out: Tensor = _Added.apply(y, base, x, bias, site, drop, *site.parameters)
    return out


def scale(x: Tensor, site: Site) -> Tensor:
    """`reference.scale_input`, differentiable with respect to x and the site's parameters of what the base reads."""
    scaled: Tensor = _Scaled.apply(x, site, *site.read_parameters)
    return scaled


def drop(x: Tensor, places: Tensor, odds: Tensor) -> Tensor:
    """`dropout.drop`, differentiable with respect to x."""
    left: Tensor = _Dropped.apply(x, places, odds)
    return left


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, site: Site, kblock: int, *parameters: Tensor
    ) -> Tensor:
        v = site.kept(x)
        y = dispatch.linear_keep(x, weight, bias, v, site.arena, site.table, site.words, kblock)
        # A copy: the model may write to its own. It takes less than the base's product once more.
        output = y.clone() if bias is None and site.by_output else None
        keep(ctx, site, x if site.reads & (FACTOR_A | GAIN) else None, v, weight, output)
        ctx.shape, ctx.bias = x.shape, bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        x, v, weight, output = ctx.saved_tensors
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            h = h.contiguous()
            dx = None
            if ctx.needs_input_grad[0]:
                dx = through(h, site) @ weight
            needed = ctx.needs_input_grad[5:]
            product = F.linear(x, weight) if any(needed) and site.gained(output is not None) else None
            gradients = _backward(site, dx, h, x, v, product, False, ctx.bias, ctx.shape, needed, output)
        return dx, None, None, None, None, *gradients


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        base: Tensor | None,
        x: Tensor,
        bias: Tensor | None,
        site: Site,
        drop: tuple[Tensor, Tensor] | None,
        *parameters: Tensor,
    ) -> Tensor:
        v, out = site.kept(x), y.clone()
        read = x if drop is None else dispatch.drop(x, *drop)
        dispatch.apply_keep_(out, v, base, read, site.arena, site.table, site.words)
        ctx.from_y, ctx.shape, ctx.bias, ctx.drop = base is None, x.shape, bias, drop
        given = y if base is None else base
        keep(ctx, site, x if site.reads & FACTOR_A else None, v, given if site.reads & GAIN else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        x, v, base = ctx.saved_tensors
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            h = h.contiguous()
            dy = through(h, site)
            dx = h.new_zeros(ctx.shape) if ctx.needs_input_grad[2] else None
            if ctx.drop is not None and x is not None:
                x = dispatch.drop(x, *ctx.drop)  # the same mask again
            gradients = _backward(site, dx, h, x, v, base, True, ctx.bias, ctx.shape, ctx.needs_input_grad[6:])
            if ctx.drop is not None and dx is not None:
                dx = dispatch.drop(dx, *ctx.drop)
        if ctx.from_y:
            return dy, None, dx, None, None, None, *gradients
        return h, dy - h if ctx.needs_input_grad[1] else None, dx, None, None, None, *gradients


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Site, *parameters: Tensor) -> Tensor:
        keep(ctx, site, x)
        return dispatch.scale_input(x, site.arena, site.table, site.words)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            dx = None
            if ctx.needs_input_grad[0]:
                with torch.enable_grad():  # other rows may have turns
                    read = x.detach().requires_grad_()
                    scaled = reference.scale_input(read, site.arena, site.table, site.words)
                (dx,) = torch.autograd.grad(scaled, read, h)
            found = sums(x, h, site, site.inputs.keys())
        gradients = [part.gradients(Found(in_gain=found[slot])) for slot, part in site.inputs.items()]
        return dx, None, *wanted(gradients, ctx.needs_input_grad[2:])


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, odds: Tensor) -> Tensor:
        ctx.drop = places, odds
        return dispatch.drop(x, places, odds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        return dispatch.drop(h.contiguous(), *ctx.drop), None, None


def keep(ctx: Any, site: Site, *tensors: Tensor | None) -> None:
    ctx.site, ctx.made = site, site.training.made(site.plan)
    ctx.save_for_backward(*tensors)


def _backward(
    site: Site,
    dx: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    v: Tensor,
    base: Tensor | None,
    biased: bool,
    bias: Tensor | None,
    shape: tuple[int, ...],
    needed: tuple[bool, ...],
    output: Tensor | None = None,
) -> list[Tensor | None]:
    """Add A^T V to `dx`, if that is wanted; the gradients of the site's parameters, None of those not `needed`. `base`:
    what the base gave, where gains are trained; `biased`: whether its `bias` is in that. `output`: what the module
    gave, for those gains that it does for."""
    where = (site.arena, site.exchanged, site.words)
    if dx is None and not any(needed):
        return [None] * len(needed)
    big = torch.empty_like(v)
    if site.ranks:
        dispatch.apply_keep_(h.new_zeros(shape) if dx is None else dx, big, None, h, *where)
    flat = torch.empty(site.size, dtype=v.dtype, device=v.device)
    if not h.numel():
        flat.zero_()
    if x is not None:
        dispatch.rank_gradients_(flat, big, x, site.a, *where)
    if site.size:
        dispatch.rank_gradients_(flat, v, h, site.b, site.arena, site.table, site.words)
    if (lying := site.lying(flat, needed)) is not None:
        return lying
    summed = SHIFT if bias is None else SHIFT | GAIN
    shifts = [slot for slot, part in site.outputs.items() if part.reads & summed]
    shift = sums(h, None, site, shifts) if shifts else {}
    gain = sums(h, base, site, site.gained(output is not None)) if base is not None else {}
    made = sums(h, output, site, site.by_output) if output is not None else {}
    gradients = []
    for slot, part in site.outputs.items():
        found = site.rank_rows(flat, slot)._replace(shift=shift.get(slot), output=made.get(slot))
        if slot in gain:
            whole = product = gain[slot]
            if bias is not None and biased:
                product = whole - bias.to(v.dtype) * shift[slot]
            elif bias is not None:
                whole = product + bias.to(v.dtype) * shift[slot]
            found = found._replace(gain=whole, product=product)
        gradients.append(part.gradients(found))
    return wanted(gradients, needed)


def wanted(gradients: list[list[Tensor]], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """One after the other, None of those not `needed`."""
    each = zip((gradient for own in gradients for gradient in own), needed, strict=True)
    return [gradient if one else None for gradient, one in each]


def through(h: Tensor, site: Site) -> Tensor:
    """h (1 + sum_i w_i gain_i) by the terms of each row's recipe: the gradient of the base's output."""
    if not site.plan.touches[site.index] & GAINS:
        return h
    return dispatch.scale_input(h, site.arena, site.exchanged, site.words)
