"""The base product with the LoRA product added to its accumulator: one launch, one store of y."""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import first_rank, read_b, sum_gains
from .work import (
    ALIGN,
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
    opaque,
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
    x, token, width, x_stride, weight, w_stride, w_rows, a, a_rows,
    BM: tl.constexpr, BN: tl.constexpr, RE: tl.constexpr, BK: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """(BN, BM) sums of weight[i] * x[token] and, if BOTH, (RE, BM) of a[i] * x[token], from the same x; else zeros.

    Rows from `w_rows` and `a_rows` on repeat the last one instead of being masked, as tokens that do not exist repeat
    the first: masks for every access were what spilled. The caller leaves out what they give.
    """
    ks = tl.arange(0, BK)[None, :]
    x_at = x + token[:, None] * x_stride
    w_at = tl.minimum(tl.arange(0, BN), w_rows - 1)[:, None] * w_stride + ks  # 32 bits reach over one tile
    a_at = tl.minimum(tl.arange(0, RE), a_rows - 1)[:, None] * width + ks
    acc = tl.zeros((BN, BM), tl.float32)
    vs = tl.zeros((RE, BM), tl.float32)
    for k in range(0, width, BK):
        inside = k + ks < width
        xs = tl.trans(tl.load(x_at + (k + ks), mask=inside, other=0.0))
        acc = mma(tl.load(weight + (w_at + k), mask=inside, other=0.0), xs, acc)
        if BOTH:
            vs = mma(tl.load(a + (a_at + k), mask=inside, other=0.0), xs, vs)
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
    FAR: tl.constexpr,  # of `read_b`
):  # fmt: skip
    """y[t] = (1 + gain) * (W x[t] + bias) + sum_e w_e (scale_e B_e^T A_e x[t] + shift_e), rounded once.

    The rows without a route are a segment of their own. The first RE rank rows of a recipe's first term are multiplied
    while x passes by for the base product; each further RE take a pass over x of their own.
    """
    rows, routes, length = header(plan, tokens)
    columns = tl.cdiv(width_out, BN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, 1, ALL) * columns)
    while tl.condition(u < end, disable_licm=True):
        rows, routes, length = header(plan, tokens)  # again, so that they need not be kept
        columns = tl.cdiv(width_out, BN)
        segment, within, tiles, _ = locate(u, columns, plan, table, rows, routes, length, BM, 1, ALL)
        u += 1
        group = within // (GROUP * columns)
        high = tl.minimum(tiles - group * GROUP, GROUP)
        within -= group * GROUP * columns
        tile, column = group * GROUP + within % high, within // high

        token, live = tile_tokens(plan, segment, tile * BM, rows, routes, length, BM)
        n = column * BN
        w = weight + n.to(tl.int64) * w_stride
        t0, t1 = segment_terms(plan, segment, rows, routes)
        rank = first_rank(plan, table, t0, t1, rows, routes)
        if rank > 0:
            a = tl.multiple_of(tl.load(read_row(plan, table, t0, rows, routes) + A), ALIGN)
            acc, first = products(
                x, token, width, x_stride, w, w_stride, width_out - n, arena + a, rank, BM, BN, RE, BK, True
            )
        else:
            acc, first = products(
                x, token, width, x_stride, w, w_stride, width_out - n, arena, 0, BM, BN, RE, BK, False
            )
        rows, routes, length = header(plan, tokens)
        cols = opaque(column) * BN + tl.arange(0, BN)
        some = cols < width_out
        t0, t1 = segment_terms(plan, segment, rows, routes)
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=some, other=0.0).to(tl.float32)[:, None]
        if t0 < t1:
            acc += sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, GAIN, BN)[:, None] * acc
            t = t0
            while tl.condition(t < t1, disable_licm=True):
                rank = tl.load(read_row(plan, table, t, rows, routes) + RANK).to(tl.int32)
                j = 0
                while tl.condition(j * RE < rank, disable_licm=True):
                    r = j * RE
                    vs = first
                    if (t != t0) | (r > 0):
                        a = tl.multiple_of(tl.load(read_row(plan, table, t, rows, routes) + A), ALIGN)
                        token, live = tile_tokens(plan, segment, opaque(tile) * BM, rows, routes, length, BM)
                        a += r.to(tl.int64) * width
                        vs = products(
                            x, token, width, x_stride, arena + a, width, rank - r, arena, 0, BM, RE, RE, BK, False
                        )[0]
                    vs = tl.where((r + tl.arange(0, RE) < rank)[:, None], vs, 0.0)
                    row = read_row(plan, table, opaque(t), rows, routes)
                    scale = read_weight(plan, t, rows, routes) * read_scale(row)
                    b = tl.multiple_of(tl.load(row + B), ALIGN)
                    acc = mma_wide(read_b(arena + b, r, rank, cols, some, width_out, RE, 1, FAR), vs * scale, acc)
                    j = opaque(j + 1)
                t = opaque(t + 1)
            acc += sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, SHIFT, BN)[:, None]
        token, live = tile_tokens(plan, segment, opaque(tile) * BM, rows, routes, length, BM)
        cols = opaque(column) * BN + tl.arange(0, BN)
        at = y + token[None, :] * width_out + cols[:, None]
        tl.store(at, acc.to(y.dtype.element_ty), mask=live[None, :] & (cols < width_out)[:, None])
