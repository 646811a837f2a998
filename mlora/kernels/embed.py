"""`embed_`: the deltas of embeddings, looked up by token, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import sum_gains
from .work import (
    GAIN,
    RANK,
    TOUCHED,
    WHOLE,
    A,
    B,
    header,
    locate,
    read_row,
    read_scale,
    read_weight,
    segment_terms,
    share,
    tile_tokens,
    total_units,
)


@triton.jit(do_not_specialize=["tokens"])
def embed(
    y,  # (tokens, out), updated
    ids,  # int64 (tokens,)
    arena, table, plan, tokens, vocab, width_out, y_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """y[t] += gain * y[t] + sum_e w_e scale_e B_e^T A_e[:, ids[t]] over the terms e of t's recipe.

    One chain over terms and rank rows, so that a token's bits do not depend on the others. A rank row that is 0 for all
    tokens of a tile is skipped, and so is an identity B: then A[j, id] goes to column j.
    """
    rows, routes, length = header(plan, tokens)
    columns = tl.cdiv(width_out, BN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, 1, TOUCHED) * columns)
    while tl.condition(u < end, disable_licm=True):
        segment, within, _, _ = locate(u, columns, plan, table, rows, routes, length, BM, 1, TOUCHED)
        token, live = tile_tokens(plan, segment, within // columns * BM, rows, routes, length, BM)
        cols = within % columns * BN + tl.arange(0, BN)
        some = cols < width_out
        mask = live[:, None] & some[None, :]
        t0, t1 = segment_terms(plan, segment, rows, routes)
        at = y + token[:, None] * y_stride + cols[None, :]
        old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        delta = sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, GAIN, BN)[None, :] * old
        picked = tl.load(ids + token, mask=live, other=0)
        for t in tl.range(t0, t1, disable_licm=True):
            row = read_row(plan, table, t, rows, routes)
            rank = tl.load(row + RANK).to(tl.int32)
            scale = read_weight(plan, t, rows, routes) * read_scale(row)
            a = arena + tl.load(row + A) + picked
            if tl.load(row + WHOLE) == 1:
                wide = cols[None, :].to(tl.int64) * vocab
                delta += tl.load(a[:, None] + wide, mask=mask, other=0.0).to(tl.float32) * scale
            else:
                b = arena + tl.load(row + B) + cols
                for _ in range(0, rank):
                    v = tl.load(a, mask=live, other=0.0).to(tl.float32) * scale
                    if tl.max((v != 0).to(tl.int32), axis=0) > 0:  # NaN too
                        delta += v[:, None] * tl.load(b, mask=some, other=0.0).to(tl.float32)[None, :]
                    a += vocab
                    b += width_out
        tl.store(at, (old + delta).to(y.dtype.element_ty), mask=mask)
        u += 1
