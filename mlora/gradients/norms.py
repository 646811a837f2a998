"""Norms under adapters that are being trained, as autograd records them: n (w' + k) + b' with a row's own w' and b'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import dispatch
from .functions import keep, through, wanted
from .parts import Found, Norm
from .recorded import Site
from .sums import sums


def change(y: Tensor, x: Tensor, normalized: Callable[[Tensor, float], Tensor], site: Site) -> Tensor:
    """`reference.apply` of gains and shifts, differentiable with respect to y and the site's parameters.

    Args:
        y: what the norm gives for x, (..., width).
        normalized: makes n of x and k; in the backward pass, since y has lost digits of it where a bias is large.
    """
    out: Tensor = _Normed.apply(y, x.detach(), normalized, site, *site.parameters)
    return out


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, normalized: Callable[[Tensor, float], Tensor], site: Site, *parameters: Tensor
    ) -> Tensor:
        out = y.clone(memory_format=torch.contiguous_format)
        dispatch.apply_(out, None, x, site.arena, site.table, site.words)
        keep(ctx, site, x)
        ctx.normalized = normalized
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            h = h.contiguous()
            dy = through(h, site) if ctx.needs_input_grad[0] else None
            gradients: list[list[Tensor]] = []
            if any(needed):
                shift = sums(h, None, site, site.outputs.keys())
                offset = next(part.offset for part in site.outputs.values() if isinstance(part, Norm))
                product = sums(h, ctx.normalized(x, offset), site, site.outputs.keys())
                for slot, part in site.outputs.items():
                    gradients.append(part.gradients(Found(shift=shift[slot], product=product[slot])))
        return dy, None, None, None, *(wanted(gradients, needed) if gradients else [None] * len(needed))
