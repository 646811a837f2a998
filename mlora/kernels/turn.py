"""`scale_input` and `turn_output`: what becomes of an input, or of an output of the base, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import sum_gains
from .work import (
    ALL,
    IN_GAIN,
    IN_TURN,
    TURN,
    header,
    locate,
    read_row,
    read_weight,
    segment_terms,
    share,
    tile_tokens,
    total_units,
)

CHAIN = tl.constexpr(64)  # elements of a block that are added up in one go: a longer chain would lose accuracy


@triton.jit
def sum_turns(
    acc, x, arena, plan, table, t0, t1, rows, routes, token, live, cols, some, width, x_stride, SIDE: tl.constexpr
):  # fmt: skip
    """acc (BM, BN) + sum_t w_t (turn_t - I) x over the terms [t0, t1), of their turns SIDE: TURN or IN_TURN."""
    for t in range(t0, t1):
        row = read_row(plan, table, t, rows, routes)
        turn = tl.load(row + SIDE)
        if turn >= 0:
            weight = read_weight(plan, t, rows, routes)
            shape = tl.load(row + SIDE + 1)
            size, stride = (shape & 0xFFFFFFFF).to(tl.int32), (shape >> 32).to(tl.int32)
            first = cols - cols // stride % size * stride  # of each column's block
            for start in range(0, size, CHAIN):
                chain = tl.zeros_like(acc)
                for j in range(start, tl.minimum(start + CHAIN, size)):
                    value = tl.load(arena + turn + tl.cast(j, tl.int64) * width + cols, mask=some, other=0.0)
                    at = x + token[:, None] * x_stride + (first + j * stride)[None, :]
                    other = tl.load(at, mask=live[:, None] & some[None, :], other=0.0)
                    chain += (weight * value.to(tl.float32))[None, :] * other.to(tl.float32)
                acc += chain
    return acc


@triton.jit(do_not_specialize=["tokens"])
def turn(
    out,  # (tokens, width), written
    x,  # (tokens, width), scaled or turned
    base,  # (tokens, width), what turned outputs are added to
    arena, table, plan, tokens, width, x_stride, base_stride,
    OUTPUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out[t] = (1 + sum_e w_e in_gain_e) * x[t] + sum_e w_e (in_turn_e - I) x[t] over the terms e of t's recipe, or
    with OUTPUT base[t] + sum_e w_e (turn_e - I) x[t]."""
    rows, routes, length = header(plan, tokens)
    columns = tl.cdiv(width, BN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, 1, ALL) * columns)
    while u < end:
        segment, within, _, _ = locate(u, columns, plan, table, rows, routes, length, BM, 1, ALL)
        token, live = tile_tokens(plan, segment, within // columns * BM, rows, routes, length, BM)
        cols = (within % columns) * BN + tl.arange(0, BN)
        some = cols < width
        mask = live[:, None] & some[None, :]
        t0, t1 = segment_terms(plan, segment, rows, routes)
        if OUTPUT:
            result = tl.load(base + token[:, None] * base_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            factor = 1 + sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, IN_GAIN, BN)
            xs = tl.load(x + token[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
            result = xs.to(tl.float32) * factor[None, :]
        result = sum_turns(
            result, x, arena, plan, table, t0, t1, rows, routes, token, live, cols, some, width, x_stride,
            TURN if OUTPUT else IN_TURN,
        )  # fmt: skip
        tl.store(out + token[:, None] * width + cols[None, :], result.to(out.dtype.element_ty), mask=mask)
        u += 1
