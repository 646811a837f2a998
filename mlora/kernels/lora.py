"""The LoRA product in two launches: `shrink` leaves v = A x in a workspace, `expand` adds B^T v to y.

The sum over `in` is a tree that depends on `in` alone: chains over leaves of `config.leaf(in)` elements, LEAVES
consecutive leaves added in order to a part, the parts added in order. With many tokens one program makes a whole
part; with few, each leaf has its own program and `expand` adds them up. So the tile sizes, the grid and the rest of
the batch never change a row's bits.

v: fp32 (slices, tokens, capacity). Slice s holds the sum over part s, or over leaf s. The rank rows of a recipe's
terms lie side by side, each term's from a multiple of 16 on, with zeros up to the next. Those beyond `capacity` are
not kept: `expand` computes them again in every tile of columns, which is slow and right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .work import (
    GAIN,
    RANK,
    RANK_ALIGN,
    RANKS,
    SHIFT,
    TOUCHED,
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

LEAVES = tl.constexpr(4)
ALIGN = tl.constexpr(8)  # elements: 16 bytes of the 16-bit types


@triton.jit
def dots(
    x, a, token, live, r, r_end, width, x_stride, start, leaves,
    BM: tl.constexpr, RC: tl.constexpr, BK: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """(RC, BM) sums of A[r + j] * x[token] over `leaves` leaves from element `start` on."""
    rs, ks = r + tl.arange(0, RC), tl.arange(0, BK)
    x_rows = x + token[:, None] * x_stride
    a_rows = a + rs[:, None].to(tl.int64) * width
    some = rs[:, None] < r_end
    total = tl.zeros((RC, BM), tl.float32)
    for leaf in range(0, leaves):
        acc = tl.zeros((RC, BM), tl.float32)
        k0 = start + leaf * LEAF
        for k in range(k0, tl.minimum(k0 + LEAF, width), BK):
            at = (k + ks)[None, :]
            inside = at < width
            xs = tl.trans(tl.load(x_rows + at, mask=live[:, None] & inside, other=0.0))
            acc = mma(tl.load(a_rows + at, mask=some & inside, other=0.0), xs, acc)
        total += acc
    return total


@triton.jit
def shrink_rows(
    v, x, a, token, live, r0, r_end, rank, col, capacity, width, x_stride, start, leaves,
    BM: tl.constexpr, RC: tl.constexpr, BK: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Rank rows [r0, r_end) of one term; those from `rank` on are zeros."""
    for r in range(r0, r_end, RC):
        sums = dots(x, a, token, live, r, tl.minimum(r_end, rank), width, x_stride, start, leaves, BM, RC, BK, LEAF)
        rs = r + tl.arange(0, RC)
        keep = live[:, None] & ((rs < r_end) & (col + rs < capacity))[None, :]
        tl.store(v + token[:, None] * capacity + (col + rs)[None, :], tl.trans(sums), mask=keep)


@triton.jit(do_not_specialize=["tokens"])
def shrink(
    v,  # fp32 (slices, tokens, capacity)
    x,  # (tokens, in)
    arena, table, plan, tokens, width, x_stride, capacity,
    BM: tl.constexpr,  # tokens of a tile
    WIDE: tl.constexpr,  # rank rows at once where a term has more than 16
    BK: tl.constexpr,
    LEAF: tl.constexpr,
    SPLIT: tl.constexpr,  # whether each leaf has a slice
    GRAIN: tl.constexpr,  # rank rows of a unit of work
):  # fmt: skip
    """v[s, t, col(e) + j] = sum over k in slice s of A_e[j, k] x[t, k], for the terms e of t's recipe."""
    rows, routes, length = header(plan, tokens)
    slices = tl.cdiv(width, LEAF * (1 if SPLIT else LEAVES))
    u, end = share(total_units(plan, table, rows, routes, length, BM, GRAIN, RANKS) * slices)
    while u < end:
        segment, within, _, units = locate(u, slices, plan, table, rows, routes, length, BM, GRAIN, RANKS)
        block, q = within // units, within % units
        q_end = tl.minimum(units, q + end - u)
        tile, s = block // slices, block % slices
        token, live = tile_tokens(plan, segment, tile, rows, routes, length, BM)
        out = v + s.to(tl.int64) * tokens * capacity
        start = s * (LEAF * (1 if SPLIT else LEAVES))
        leaves = 1 if SPLIT else tl.minimum(LEAVES, tl.cdiv(width - start, LEAF))
        t0, t1 = segment_terms(plan, segment, rows, routes)
        passed, col = 0, 0
        for t in range(t0, t1):
            row = read_row(plan, table, t, rows, routes)
            rank = tl.load(row + RANK).to(tl.int32)
            r0 = tl.maximum(q - passed, 0) * GRAIN
            r1 = (q_end - passed) * GRAIN
            if r1 >= rank:  # the last rank rows come with the padding behind them, which `expand` reads
                r1 = tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
            a = tl.load(row + A)
            if (r0 < r1) & (r0 < rank):
                if a % ALIGN != 0:
                    shrink_rows(
                        out, x, arena + a, token, live, r0, r1, rank, col, capacity, width, x_stride, start, leaves,
                        BM, 16, BK, LEAF,
                    )  # fmt: skip
                elif WIDE > 16 and r1 - r0 > 16:
                    shrink_rows(
                        out, x, arena + tl.multiple_of(a, ALIGN), token, live, r0, r1, rank, col, capacity, width,
                        x_stride, start, leaves, BM, WIDE, BK, LEAF,
                    )  # fmt: skip
                else:
                    shrink_rows(
                        out, x, arena + tl.multiple_of(a, ALIGN), token, live, r0, r1, rank, col, capacity, width,
                        x_stride, start, leaves, BM, 16, BK, LEAF,
                    )  # fmt: skip
            passed += tl.cdiv(rank, GRAIN)
            col += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
        u += q_end - q


@triton.jit
def read_v(
    v, token, live, col, r, rank, tokens, capacity, width, BM: tl.constexpr, RE: tl.constexpr,
    LEAF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """(RE, BM) sums over all slices, in the order of the tree."""
    rs = r + tl.arange(0, RE)
    at = v + token[None, :] * capacity + (col + rs)[:, None]
    mask = live[None, :] & (rs < tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN)[:, None]  # so whole vectors can be loaded
    step = tokens.to(tl.int64) * capacity
    total = tl.zeros((RE, BM), tl.float32)
    if SPLIT:
        slices = tl.cdiv(width, LEAF)
        for part in range(0, slices, LEAVES):
            acc = tl.zeros((RE, BM), tl.float32)
            for s in range(part, tl.minimum(part + LEAVES, slices)):
                acc += tl.load(at + s * step, mask=mask, other=0.0)
            total += acc
    else:
        for s in range(0, tl.cdiv(width, LEAF * LEAVES)):
            total += tl.load(at + s * step, mask=mask, other=0.0)
    return total


@triton.jit
def compute_v(
    x, a, token, live, r, rank, width, x_stride, BM: tl.constexpr, RE: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """What `read_v` returns, for rank rows that the workspace has no room for. Steps of 16 elements need few registers
    and keep the chains of `shrink`: 16 is what a tensor-core instruction takes."""
    total = tl.zeros((RE, BM), tl.float32)
    for start in range(0, width, LEAF * LEAVES):
        leaves = tl.minimum(LEAVES, tl.cdiv(width - start, LEAF))
        total += dots(x, a, token, live, r, rank, width, x_stride, start, leaves, BM, RE, 16, LEAF)
    return total


@triton.jit
def read_b(arena, b, r, rank, cols, some, width_out, RE: tl.constexpr):
    """(BN, RE) of B."""
    rs = r + tl.arange(0, RE)
    at = rs[None, :].to(tl.int64) * width_out + cols[:, None]
    mask = (rs < rank)[None, :] & some[:, None]
    if b % ALIGN == 0:
        values = tl.load(arena + tl.multiple_of(b, ALIGN) + at, mask=mask, other=0.0)
    else:
        values = tl.load(arena + b + at, mask=mask, other=0.0)
    return values


@triton.jit
def sum_gains(
    arena, plan, table, t0, t1, rows, routes, cols, some, PART: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """(BN,) weighted sum of one per-column part over the terms that have it."""
    total = tl.zeros((BN,), tl.float32)
    for t in range(t0, t1):
        row = read_row(plan, table, t, rows, routes)
        at = tl.load(row + PART)
        if at >= 0:
            if at % ALIGN == 0:
                part = tl.load(arena + tl.multiple_of(at, ALIGN) + cols, mask=some, other=0.0)
            else:
                part = tl.load(arena + at + cols, mask=some, other=0.0)
            total += read_weight(plan, t, rows, routes) * part.to(tl.float32)
    return total


@triton.jit
def first_rank(plan, table, t0, t1, rows, routes):
    """The rank of the first of the terms [t0, t1), 0 if there is none."""
    rank = 0
    if t0 < t1:
        rank = tl.load(read_row(plan, table, t0, rows, routes) + RANK).to(tl.int32)
    return rank


@triton.jit
def add_delta(
    acc, v, kept, kept_next, x, arena, plan, table, t0, t1, rows, routes, token, live, cols, some, tokens, capacity,
    width, width_out, x_stride, BM: tl.constexpr, RE: tl.constexpr, LEAF: tl.constexpr,
    SPLIT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """acc (BN, BM) + sum_e w_e scale_e B_e^T v_e over the terms [t0, t1), for one tile of columns.

    kept, kept_next: if KEEP, v of the first 2 * RE rank rows of the first term: for most adapters all there is.
    """
    col = 0
    for t in range(t0, t1):
        row = read_row(plan, table, t, rows, routes)
        rank = tl.load(row + RANK).to(tl.int32)
        scale = read_weight(plan, t, rows, routes) * read_scale(row)
        a, b = tl.load(row + A), tl.load(row + B)
        for r in range(0, rank, RE):
            if KEEP and (t == t0) & (r == 0):
                vs = kept
            elif KEEP and (t == t0) & (r == RE):
                vs = kept_next
            elif col + r + RE <= capacity:
                at = tl.multiple_of(col, RANK_ALIGN)
                vs = read_v(v, token, live, at, r, rank, tokens, capacity, width, BM, RE, LEAF, SPLIT)
            else:
                vs = compute_v(x, arena + a, token, live, r, rank, width, x_stride, BM, RE, LEAF)
            acc = mma_wide(read_b(arena, b, r, rank, cols, some, width_out, RE), vs * scale, acc)
        col += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
    return acc


@triton.jit(do_not_specialize=["tokens"])
def expand(
    y,  # (tokens, out), updated
    base,  # (tokens, out), or y
    v,  # fp32 (slices, tokens, capacity), from `shrink`
    x, arena, table, plan, tokens, width, width_out, x_stride, y_stride, base_stride, capacity,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RE: tl.constexpr,  # rank rows at once
    LEAF: tl.constexpr,
    SPLIT: tl.constexpr,
    GRAIN: tl.constexpr,  # columns of a unit of work
):  # fmt: skip
    """y[t] += gain * base[t] + sum_e w_e (scale_e B_e^T v[t, e] + shift_e) over the terms e of t's recipe."""
    rows, routes, length = header(plan, tokens)
    grains = tl.cdiv(width_out, GRAIN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, GRAIN, TOUCHED) * grains)
    while u < end:
        segment, within, _, _ = locate(u, grains, plan, table, rows, routes, length, BM, GRAIN, TOUCHED)
        tile, g = within // grains, within % grains
        g_end = tl.minimum(grains, g + end - u)
        token, live = tile_tokens(plan, segment, tile, rows, routes, length, BM)
        t0, t1 = segment_terms(plan, segment, rows, routes)
        rank = first_rank(plan, table, t0, t1, rows, routes)
        kept = read_v(v, token, live, 0, 0, rank, tokens, capacity, width, BM, RE, LEAF, SPLIT)
        kept_next = read_v(v, token, live, 0, RE, rank, tokens, capacity, width, BM, RE, LEAF, SPLIT)
        stop = tl.minimum(g_end * GRAIN, width_out)
        for n in range(g * GRAIN, stop, BN):
            cols = n + tl.arange(0, BN)
            some = cols < stop
            mask = live[None, :] & some[:, None]
            at = y + token[None, :] * y_stride + cols[:, None]
            acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            gain = sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, GAIN, BN)
            if tl.max(tl.abs(gain), axis=0) > 0:
                source = tl.load(base + token[None, :] * base_stride + cols[:, None], mask=mask, other=0.0)
                acc += gain[:, None] * source.to(tl.float32)
            acc = add_delta(
                acc, v, kept, kept_next, x, arena, plan, table, t0, t1, rows, routes, token, live, cols, some, tokens,
                capacity, width, width_out, x_stride, BM, RE, LEAF, SPLIT, True,
            )  # fmt: skip
            acc += sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, SHIFT, BN)[:, None]
            tl.store(at, acc.to(y.dtype.element_ty), mask=mask)
        u += g_end - g
