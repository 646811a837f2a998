"""The base product with the LoRA product added to its accumulator: one launch beyond `shrink`, one store of y."""

from __future__ import annotations

import triton
import triton.language as tl

from .lora import add_delta, sum_gains
from .work import ALL, GAIN, SHIFT, header, locate, mma, segment_terms, share, tile_tokens, total_units

GROUP = tl.constexpr(8)  # tiles of tokens that a column of tiles is worked through together, to reuse W from the cache


@triton.jit(do_not_specialize=["tokens"])
def linear(
    y,  # (tokens, out), written
    v,  # fp32 (slices, tokens, capacity), from `shrink`
    x,  # (tokens, in)
    weight,  # (out, in)
    bias,  # (out,), or weight
    arena, table, plan, tokens, width, width_out, x_stride, w_stride, capacity,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RE: tl.constexpr,
    BK: tl.constexpr,
    LEAF: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """y[t] = (1 + gain) * (W x[t] + bias) + sum_e w_e (scale_e B_e^T v[t, e] + shift_e), rounded once.

    The rows without a route are a segment of their own.
    """
    rows, routes, length = header(plan, tokens)
    columns = tl.cdiv(width_out, BN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, 1, ALL) * columns)
    ks = tl.arange(0, BK)
    while u < end:
        segment, within, tiles, _ = locate(u, columns, plan, table, rows, routes, length, BM, 1, ALL)
        group = within // (GROUP * columns)
        high = tl.minimum(tiles - group * GROUP, GROUP)
        within -= group * GROUP * columns
        tile, column = group * GROUP + within % high, within // high

        token, live = tile_tokens(plan, segment, tile, rows, routes, length, BM)
        cols = column * BN + tl.arange(0, BN)
        some = cols < width_out
        acc = tl.zeros((BN, BM), tl.float32)
        x_rows = x + token[:, None] * x_stride
        w_rows = weight + cols[:, None].to(tl.int64) * w_stride
        for k in range(0, width, BK):
            inside = (k + ks)[None, :] < width
            xs = tl.load(x_rows + (k + ks)[None, :], mask=live[:, None] & inside, other=0.0)
            ws = tl.load(w_rows + (k + ks)[None, :], mask=some[:, None] & inside, other=0.0)
            acc = mma(ws, tl.trans(xs), acc)
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=some, other=0.0).to(tl.float32)[:, None]

        t0, t1 = segment_terms(plan, segment, rows, routes)
        if t0 < t1:
            gain = sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, GAIN, BN)
            acc += gain[:, None] * acc
            acc = add_delta(
                acc, v, 0, 0, x, arena, plan, table, t0, t1, rows, routes, token, live, cols, some, tokens, capacity,
                width, width_out, x_stride, BM, RE, LEAF, SPLIT, False,
            )  # fmt: skip
            acc += sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, SHIFT, BN)[:, None]
        at = y + token[None, :] * width_out + cols[:, None]
        tl.store(at, acc.to(y.dtype.element_ty), mask=live[None, :] & some[:, None])
        u += 1
