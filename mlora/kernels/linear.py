"""The base product with the LoRA product added to its accumulator: one launch, one store of y."""

from __future__ import annotations

import triton
import triton.language as tl

from .lora import ALIGN, dots, first_rank, read_b, sum_gains
from .work import (
    ALL,
    GAIN,
    RANK,
    SHIFT,
    A,
    B,
    header,
    locate,
    mma,
    mma_wide,
    read_row,
    read_scale,
    read_weight,
    segment_terms,
    share,
    tile_tokens,
    total_units,
)

GROUP = tl.constexpr(8)  # tiles of tokens that a column of tiles is worked through together, to reuse W from the cache


@triton.jit
def products(
    x, weight, a, token, live, cols, some, rank, width, x_stride, w_stride,
    BM: tl.constexpr, BN: tl.constexpr, RE: tl.constexpr, BK: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """(BN, BM) of W x and, if BOTH, (RE, BM) of the first rank rows of A x, from the same x; else zeros."""
    ks, rs = tl.arange(0, BK), tl.arange(0, RE)
    x_rows = x + token[:, None] * x_stride
    w_rows = weight + cols[:, None].to(tl.int64) * w_stride
    a_rows = a + rs[:, None].to(tl.int64) * width
    acc = tl.zeros((BN, BM), tl.float32)
    vs = tl.zeros((RE, BM), tl.float32)
    for k in range(0, width, BK):
        at = (k + ks)[None, :]
        inside = at < width
        xs = tl.trans(tl.load(x_rows + at, mask=live[:, None] & inside, other=0.0))
        acc = mma(tl.load(w_rows + at, mask=some[:, None] & inside, other=0.0), xs, acc)
        if BOTH:
            vs = mma(tl.load(a_rows + at, mask=(rs < rank)[:, None] & inside, other=0.0), xs, vs)
    return acc, vs


@triton.jit(do_not_specialize=["tokens"])
def linear(
    y,  # (tokens, out), written
    x,  # (tokens, in)
    weight,  # (out, in)
    bias,  # (out,), or weight
    arena, table, plan, tokens, width, width_out, x_stride, w_stride,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """y[t] = (1 + gain) * (W x[t] + bias) + sum_e w_e (scale_e B_e^T A_e x[t] + shift_e), rounded once.

    The rows without a route are a segment of their own. The first RE rank rows of a recipe's first term are multiplied
    while x passes by for the base product; each further RE take a pass over x of their own.
    """
    rows, routes, length = header(plan, tokens)
    columns = tl.cdiv(width_out, BN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, 1, ALL) * columns)
    while tl.condition(u < end, disable_licm=True):
        segment, within, tiles, _ = locate(u, columns, plan, table, rows, routes, length, BM, 1, ALL)
        group = within // (GROUP * columns)
        high = tl.minimum(tiles - group * GROUP, GROUP)
        within -= group * GROUP * columns
        tile, column = group * GROUP + within % high, within // high

        token, live = tile_tokens(plan, segment, tile, rows, routes, length, BM)
        cols = column * BN + tl.arange(0, BN)
        some = cols < width_out
        t0, t1 = segment_terms(plan, segment, rows, routes)
        rank, a = first_rank(plan, table, t0, t1, rows, routes)
        if rank > 0:
            acc, first = products(
                x, weight, arena + tl.multiple_of(a, ALIGN), token, live, cols, some, rank, width, x_stride, w_stride,
                BM, BN, RE, BK, True,
            )  # fmt: skip
        else:
            acc, first = products(
                x, weight, arena, token, live, cols, some, 0, width, x_stride, w_stride, BM, BN, RE, BK, False
            )
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=some, other=0.0).to(tl.float32)[:, None]
        if t0 < t1:
            acc += sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, GAIN, BN)[:, None] * acc
            for t in tl.range(t0, t1, disable_licm=True):
                row = read_row(plan, table, t, rows, routes)
                rank = tl.load(row + RANK).to(tl.int32)
                scale = read_weight(plan, t, rows, routes) * read_scale(row)
                a, b = tl.multiple_of(tl.load(row + A), ALIGN), tl.multiple_of(tl.load(row + B), ALIGN)
                for r in tl.range(0, rank, RE, disable_licm=True):
                    if (t == t0) & (r == 0):
                        vs = first
                    else:
                        vs = dots(x, arena + a, token, live, r, rank, width, x_stride, 0, width, BM, RE, BK, 1 << 30)
                    acc = mma_wide(read_b(arena + b, r, rank, cols, some, width_out, RE), vs * scale, acc)
            acc += sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, SHIFT, BN)[:, None]
        at = y + token[None, :] * width_out + cols[:, None]
        tl.store(at, acc.to(y.dtype.element_ty), mask=live[None, :] & some[:, None])
        u += 1
