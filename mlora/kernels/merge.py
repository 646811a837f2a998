"""`merge`: a whole recipe folded into the base weight in one pass over it."""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import sum_gains
from .work import GAIN, IN_GAIN, RANK, A, B, header, mma, read_row, read_scale, read_weight, segment_terms


@triton.jit
def merge(
    weight,  # (out, in), written
    source,  # (out, in), read; may be the weight
    arena, table, plan, width_out, width, w_stride, s_stride,
    BM: tl.constexpr,  # rows of the weight
    BN: tl.constexpr,  # columns of the weight
    RE: tl.constexpr,
):  # fmt: skip
    """W[o, i] <- (1 + gain[o] + in_gain[i]) * S[o, i] + sum_e w_e scale_e B_e[:, o] . A_e[:, i], rounded once, over
    the terms e of the plan's first route. No cross term of the gains: deltas add."""
    rows, routes, _ = header(plan, 1)
    columns = tl.cdiv(width, BN)
    tile = tl.program_id(0)
    outs, ins = (tile // columns) * BM + tl.arange(0, BM), (tile % columns) * BN + tl.arange(0, BN)
    some_out, some_in = outs < width_out, ins < width
    t0, t1 = segment_terms(plan, 0, rows, routes)
    mask = some_out[:, None] & some_in[None, :]
    far = outs[:, None].to(tl.int64)
    old = tl.load(source + far * s_stride + ins[None, :], mask=mask, other=0.0).to(tl.float32)
    gain = sum_gains(arena, plan, table, t0, t1, rows, routes, outs, some_out, GAIN, BM)
    in_gain = sum_gains(arena, plan, table, t0, t1, rows, routes, ins, some_in, IN_GAIN, BN)
    total = (1 + gain[:, None] + in_gain[None, :]) * old
    for t in range(t0, t1):
        row = read_row(plan, table, t, rows, routes)
        rank = tl.load(row + RANK).to(tl.int32)
        a, b = arena + tl.load(row + A), arena + tl.load(row + B)
        acc = tl.zeros((BM, BN), tl.float32)
        for r in range(0, rank, RE):
            rs = r + tl.arange(0, RE)
            some = (rs < rank)[:, None]
            wide = rs[:, None].to(tl.int64)
            bs = tl.load(b + wide * width_out + outs[None, :], mask=some & some_out[None, :], other=0.0)
            as_ = tl.load(a + wide * width + ins[None, :], mask=some & some_in[None, :], other=0.0)
            acc = mma(tl.trans(bs), as_, acc)
        total += (read_weight(plan, t, rows, routes) * read_scale(row)) * acc
    tl.store(weight + far * w_stride + ins[None, :], total.to(weight.dtype.element_ty), mask=mask)
