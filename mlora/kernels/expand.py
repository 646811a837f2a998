"""The second launch of the LoRA product: `expand` adds B^T v to y. For v see `shrink.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .work import (
    ALIGN,
    GAIN,
    RANK,
    RANK_ALIGN,
    SHIFT,
    TOUCHED,
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
    tile_place,
    tile_tokens,
    total_units,
)

COLUMNS = tl.constexpr(16)  # that tiles of `expand` are counted in


@triton.jit
def read_v(v, count, r, rank, capacity, BM: tl.constexpr, RE: tl.constexpr):
    """(RE, BM) of a term's A x."""
    js, rs = tl.arange(0, BM), tl.arange(0, RE)
    mask = (js < count)[None, :] & (r + rs < tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN)[:, None]  # whole vectors
    return tl.load(v + r + (js[None, :] * capacity + rs[:, None]), mask=mask, other=0.0)


@triton.jit
def compute_v(
    x, a, token, live, r, rank, width, x_stride, BM: tl.constexpr, RE: tl.constexpr, LEAF: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """What `read_v` returns, for recipes that the workspace has no room for. Steps of 16 elements need few registers
    and keep the chains of `shrink`: 16 is what a tensor-core instruction takes."""
    total = tl.zeros((RE, BM), tl.float32)
    part = tl.zeros((RE, BM), tl.float32)
    pair = tl.zeros((RE, BM), tl.float32)
    acc = tl.zeros((RE, BM), tl.float32)
    rs, ks = r + tl.arange(0, RE), tl.arange(0, 16)
    i = 0
    while tl.condition(i * 16 < width, disable_licm=True):
        at = i * 16 + ks[None, :]
        inside = at < width
        far = opaque(token.to(tl.int32)).to(tl.int64)
        xs = tl.trans(tl.load(x + far[:, None] * x_stride + at, mask=live[:, None] & inside, other=0.0))
        a_at = a + rs[:, None].to(tl.int64) * width + at
        acc = mma(tl.load(a_at, mask=(rs < rank)[:, None] & inside, other=0.0), xs, acc)
        i = opaque(i + 1)
        if (i * 16 % LEAF == 0) | (i * 16 >= width):
            pair += acc
            acc = tl.zeros_like(acc)
            if (i * 16 % (LEAF * 2) == 0) | (i * 16 >= width):
                part += pair
                pair = tl.zeros_like(pair)
                if (i * 16 % (LEAF * PART) == 0) | (i * 16 >= width):
                    total += part
                    part = tl.zeros_like(part)
    return total


@triton.jit
def read_b(b, r, rank, cols, some, width_out, RE: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr):
    """(BN, RE) of B, by a load of WIDE times the rank rows, of which all but the first RE are masked: so a thread that
    loads anything has WIDE times the columns. With FAR, 32 bits may not reach over a B."""
    BN: tl.constexpr = cols.shape[0]
    rs = tl.arange(0, RE * WIDE)
    rows = r + rs
    if FAR:
        rows = rows.to(tl.int64)
    at = rows[None, :] * width_out + cols[:, None]
    mask = ((rs < RE) & (r + rs < rank))[None, :] & some[:, None]
    tile = tl.load(b + at, mask=mask, other=0.0)
    if WIDE == 4:
        tile = tl.split(tl.permute(tl.reshape(tile, (BN, 2, RE * 2)), (0, 2, 1)))[0]
    if WIDE >= 2:
        tile = tl.split(tl.permute(tl.reshape(tile, (BN, 2, RE)), (0, 2, 1)))[0]
    return tile


@triton.jit
def sum_gains(
    arena, plan, table, t0, t1, rows, routes, cols, some, PART: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """(BN,) weighted sum of one per-column part over the terms that have it."""
    total = tl.zeros((BN,), tl.float32)
    for t in tl.range(t0, t1, disable_licm=True):
        row = read_row(plan, table, t, rows, routes)
        at = tl.load(row + PART)
        if at >= 0:
            part = tl.load(arena + tl.multiple_of(at, ALIGN) + cols, mask=some, other=0.0)
            total += read_weight(plan, t, rows, routes) * part.to(tl.float32)
    return total


@triton.jit
def add_gains_and_shifts(
    acc, base, arena, plan, table, t0, t1, rows, routes, token, cols, mask, base_stride
):  # fmt: skip
    """acc (BN, BM) + sum_t w_t (gain_t * base + shift_t) over the terms [t0, t1)."""
    each = cols[:, None] + tl.zeros_like(token)[None, :]  # per token: as vectors, parts would change hands
    t = t0
    while tl.condition(t < t1, disable_licm=True):
        row = read_row(plan, table, t, rows, routes)
        gain, shift = tl.load(row + GAIN), tl.load(row + SHIFT)
        if gain >= 0:
            part = tl.load(arena + tl.multiple_of(gain, ALIGN) + each, mask=mask, other=0.0).to(tl.float32)
            source = tl.load(base + token[None, :] * base_stride + cols[:, None], mask=mask, other=0.0)
            acc += read_weight(plan, t, rows, routes) * part * source.to(tl.float32)
        if shift >= 0:
            part = tl.load(arena + tl.multiple_of(shift, ALIGN) + each, mask=mask, other=0.0).to(tl.float32)
            acc += read_weight(plan, t, rows, routes) * part
        t = opaque(t + 1)
    return acc


@triton.jit
def first_rank(plan, table, t0, t1, rows, routes):
    """The rank of the first of the terms [t0, t1), 0 if there is none."""
    rank = 0
    if t0 < t1:
        rank = tl.load(read_row(plan, table, t0, rows, routes) + RANK).to(tl.int32)
    return rank


@triton.jit
def columns_of_v(plan, table, t0, t1, rows, routes):
    """Columns of v that the terms [t0, t1) take."""
    columns = 0
    t = t0
    while tl.condition(t < t1, disable_licm=True):
        rank = tl.load(read_row(plan, table, t, rows, routes) + RANK).to(tl.int32)
        columns += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
        t = opaque(t + 1)
    return columns


@triton.jit
def expand_tile(
    y, base, v, x, arena, table, plan, segment, tile, first, stop, rows, routes, length, width, width_out, x_stride,
    y_stride, base_stride, capacity,
    BM: tl.constexpr, BN: tl.constexpr, RE: tl.constexpr, WIDE: tl.constexpr, LEAF: tl.constexpr, PART: tl.constexpr,
    FAR: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """The columns [COLUMNS * first, stop) of a tile of tokens; FITS: the workspace holds all of its rank rows. If it
    does not, all are computed again, in a loop of its own that keeps none: one loop for both would keep both's."""
    token, live = tile_tokens(plan, segment, tile * BM, rows, routes, length, BM)
    t0, t1 = segment_terms(plan, segment, rows, routes)
    position, count = tile_place(plan, segment, tile, routes, length, BM)
    own = v + position.to(tl.int64) * capacity
    if FITS:
        rank = first_rank(plan, table, t0, t1, rows, routes)
        kept0 = read_v(own, count, 0, rank, capacity, BM, RE)  # for most adapters all there is
        kept1 = read_v(own, count, RE, rank, capacity, BM, RE)
        kept2 = read_v(own, count, 2 * RE, rank, capacity, BM, RE)
        kept3 = read_v(own, count, 3 * RE, rank, capacity, BM, RE)
    c = first
    while tl.condition(c * COLUMNS < stop, disable_licm=True):
        cols = c * COLUMNS + tl.arange(0, BN)
        some = cols < stop
        mask = live[None, :] & some[:, None]
        far = opaque(token.to(tl.int32)).to(tl.int64)  # no pointers are kept beside it
        acc = tl.load(y + far[None, :] * y_stride + cols[:, None], mask=mask, other=0.0).to(tl.float32)
        acc = add_gains_and_shifts(
            acc, base, arena, plan, table, t0, t1, rows, routes, far, cols, mask, base_stride
        )  # fmt: skip
        col = 0
        t = t0
        while tl.condition(t < t1, disable_licm=True):
            rank = tl.load(read_row(plan, table, t, rows, routes) + RANK).to(tl.int32)
            j = 0
            while tl.condition(j * RE < rank, disable_licm=True):
                r = j * RE
                if not FITS:
                    a = tl.multiple_of(tl.load(read_row(plan, table, t, rows, routes) + A), ALIGN)
                    near, here = token, live
                    if BM == 32:  # decode: again, so that they are not kept beside four sums
                        near, here = tile_tokens(plan, segment, opaque(tile) * BM, rows, routes, length, BM)
                    vs = compute_v(x, arena + a, near, here, r, rank, width, x_stride, BM, RE, LEAF, PART)
                elif (t == t0) & (r < 4 * RE):
                    vs = tl.where(r < 2 * RE, tl.where(r < RE, kept0, kept1), tl.where(r < 3 * RE, kept2, kept3))
                else:
                    vs = read_v(own + tl.multiple_of(col, RANK_ALIGN), count, r, rank, capacity, BM, RE)
                row = read_row(plan, table, opaque(t), rows, routes)  # only now: `compute_v` needs the registers
                scale = read_weight(plan, t, rows, routes) * read_scale(row)
                b = tl.multiple_of(tl.load(row + B), ALIGN)
                acc = mma_wide(read_b(arena + b, r, rank, cols, some, width_out, RE, WIDE, FAR), vs * scale, acc)
                j = opaque(j + 1)
            col += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
            t = opaque(t + 1)
        cols = opaque(c) * COLUMNS + tl.arange(0, BN)
        at = y + far[None, :] * y_stride + cols[:, None]
        tl.store(at, acc.to(y.dtype.element_ty), mask=live[None, :] & (cols < stop)[:, None])
        c = opaque(c + BN // COLUMNS)


@triton.jit(do_not_specialize=["tokens"])
def expand(
    y,  # (tokens, out), updated
    base,  # (tokens, out), or y
    v,  # fp32 (slices, tokens, capacity), from `shrink`
    x, arena, table, plan, tokens, width, width_out, x_stride, y_stride, base_stride, capacity,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RE: tl.constexpr,  # rank rows at once
    WIDE: tl.constexpr,  # of `read_b`
    FAR: tl.constexpr,  # of `read_b`
    LEAF: tl.constexpr,
    PART: tl.constexpr,
    GRAIN: tl.constexpr,  # columns of a unit of work
):  # fmt: skip
    """y[t] += gain * base[t] + sum_e w_e (scale_e B_e^T v[t, e] + shift_e) over the terms e of t's recipe."""
    rows, routes, length = header(plan, tokens)
    grains = tl.cdiv(width_out, GRAIN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, GRAIN, TOUCHED) * grains)
    while tl.condition(u < end, disable_licm=True):
        rows, routes, length = header(plan, tokens)  # again, and u moves on early: few numbers are kept
        grains = tl.cdiv(width_out, GRAIN)
        segment, within, _, _ = locate(u, grains, plan, table, rows, routes, length, BM, GRAIN, TOUCHED)
        tile, g = within // grains, within % grains
        g_end = tl.minimum(grains, g + end - u)
        u += g_end - g
        first, stop = g * (GRAIN // COLUMNS), tl.minimum(g_end * GRAIN, width_out)
        t0, t1 = segment_terms(plan, segment, rows, routes)
        if columns_of_v(plan, table, t0, t1, rows, routes) <= capacity:
            expand_tile(
                y, base, v, x, arena, table, plan, segment, tile, first, stop, rows, routes, length, width, width_out,
                x_stride, y_stride, base_stride, capacity, BM, BN, RE, WIDE, LEAF, PART, FAR, True,
            )  # fmt: skip
        else:
            expand_tile(
                y, base, v, x, arena, table, plan, segment, tile, first, stop, rows, routes, length, width, width_out,
                x_stride, y_stride, base_stride, capacity, BM, BN, RE, WIDE, LEAF, PART, FAR, False,
            )  # fmt: skip
