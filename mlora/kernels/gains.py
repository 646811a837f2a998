"""`scale_input`: the input gains, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .lora import sum_gains
from .work import ALL, IN_GAIN, header, locate, segment_terms, share, tile_tokens, total_units


@triton.jit(do_not_specialize=["tokens"])
def scale_input(
    out,  # (tokens, in), written
    x,  # (tokens, in)
    arena, table, plan, tokens, width, x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out[t] = (1 + sum_e w_e in_gain_e) * x[t] over the terms e of t's recipe."""
    rows, routes, length = header(plan, tokens)
    columns = tl.cdiv(width, BN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, 1, ALL) * columns)
    while u < end:
        segment, within, _, _ = locate(u, columns, plan, table, rows, routes, length, BM, 1, ALL)
        token, live = tile_tokens(plan, segment, within // columns, rows, routes, length, BM)
        cols = (within % columns) * BN + tl.arange(0, BN)
        some = cols < width
        mask = live[:, None] & some[None, :]
        t0, t1 = segment_terms(plan, segment, rows, routes)
        factor = 1 + sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, IN_GAIN, BN)
        xs = tl.load(x + token[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
        result = (xs.to(tl.float32) * factor[None, :]).to(out.dtype.element_ty)
        tl.store(out + token[:, None] * width + cols[None, :], result, mask=mask)
        u += 1
