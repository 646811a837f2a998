"""Embeddings of tokens under adapters that are being trained, as autograd records them.

With h the gradient of y = W[ids] + B^T v, v = s A[:, ids] in fp32, and V = s B h, of one row of one adapter:

    A[:, i]     sum V over the adapter's tokens that are i; none of the token that the embedding pads with, as in torch
    B           sum v h^T over the adapter's tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import dispatch, reference
from ..ops.training import split
from .functions import keep, through, wanted
from .parts import FACTOR_A, FACTOR_B
from .recorded import Site


def change(y: Tensor, ids: Tensor, vocab: int, padding: int | None, site: Site) -> Tensor:
    """`reference.embed`, differentiable with respect to y and the site's parameters; `padding`: the token that the
    embedding pads with."""
    out: Tensor = _Embedded.apply(y, ids, vocab, padding, site, *site.parameters)
    return out


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, ids: Tensor, vocab: int, padding: int | None, site: Site, *parameters: Tensor
    ) -> Tensor:
        out = y.clone()
        dispatch.embed_(out, ids, site.arena, site.table, site.words, vocab)
        keep(ctx, site, ids)
        ctx.vocab, ctx.padding = vocab, padding
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        with ctx.site.training.again(ctx.made) as plan:
            site = ctx.site.training.site(plan, ctx.site.index)
            h = h.contiguous()
            dy = through(h, site) if ctx.needs_input_grad[0] else None
            own = _gradients(site, h, ids, ctx.vocab, ctx.padding) if any(needed) else None
        return dy, None, None, None, None, *(wanted(own, needed) if own is not None else [None] * len(needed))


def _gradients(site: Site, h: Tensor, ids: Tensor, vocab: int, padding: int | None) -> list[list[Tensor]]:
    dtype = torch.promote_types(h.dtype, torch.float32)
    flat, tokens = h.flatten(0, -2), ids.flatten()
    buffer = torch.empty(site.size, dtype=dtype, device=h.device)
    if not flat.numel():
        buffer.zero_()
    count = len(flat) // site.rows * site.ranks
    routes = reference.routes(site.words, site.table, len(flat))
    if site.reads & FACTOR_B:
        v = torch.empty(count, dtype=dtype, device=h.device)
        parts = split(v, routes)
        for route in routes:
            for t in route.terms:
                if t.rank:
                    a = site.arena[t.a : t.a + t.rank * vocab].view(t.rank, vocab)
                    next(parts).copy_(a[:, tokens[route.tokens]].t() * (t.weight * t.scale))
        dispatch.rank_gradients_(buffer, v, h, site.b, site.arena, site.table, site.words)
    if site.reads & FACTOR_A:
        # The transposed call, of which V alone is wanted: it adds to a single column, which is left.
        big = torch.empty(count, dtype=dtype, device=h.device)
        column = flat.new_zeros(len(flat), 1)
        dispatch.apply_keep_(column, big, None, flat, site.arena, site.exchanged, site.words)
        parts = split(big, routes)
        begun = set()
        for route in routes:
            for t in route.terms:
                if not t.rank:
                    continue
                part = next(parts)
                if t.slot not in site.outputs or site.outputs[t.slot].shape_a is None:
                    continue
                place = site.rank_rows(buffer, t.slot).a
                assert place is not None
                rows = torch.ops.aten.embedding_dense_backward(
                    part.contiguous(), tokens[route.tokens], vocab, -1 if padding is None else padding, False
                )
                place.copy_(place + rows.t() if t.slot in begun else rows.t())
                begun.add(t.slot)
    return [part.gradients(site.rank_rows(buffer, slot)) for slot, part in site.outputs.items()]
