"""The LoRA product in two launches: `shrink` leaves v = A x in a workspace, `expand` adds B^T v to y.

The sum over `in` is a tree that depends on `in` alone: chains over leaves of `config.leaf(in)` elements, two
consecutive leaves added to a pair, two pairs to a part, the parts added in order. Each program of `shrink` makes one
leaf or one pair (few tokens, see `divide`) or one part (many) of some tokens and rank rows, and the program that is the
last to leave something of a tile of tokens adds up the tile's slices, in the order of the tree whichever program that
is. So the tile sizes, the grid and the rest of the batch never change a row's bits. Who is the last is told by a
counter for each tile, which is 0 before and after the launch: an integer, no sum of floats depends on the order of
arrivals.

v: fp32 (slices, tokens, capacity), tokens in the order of the plan. Slice s holds part s, pair s or leaf s, and at the
end slice 0 holds the sum. The rank rows of a recipe's terms lie side by side, each term's from a multiple of 16 on,
with zeros up to the next. A recipe that has more than `capacity` is not served from v: `expand` computes all of its
rank rows again in every tile of columns, which is slow and right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .expand import compute_v
from .work import (
    ALIGN,
    RANK,
    RANK_ALIGN,
    RANKS,
    A,
    header,
    kept_place,
    locate,
    mma,
    read_row,
    read_scale,
    read_weight,
    segment_terms,
    share_halves,
    tile_place,
    tile_tokens,
    total_units,
)


@triton.jit
def dots(
    x, a, token, live, r, r_end, width, x_stride, start, stop,
    BM: tl.constexpr, RC: tl.constexpr, BK: tl.constexpr, LEAF: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """(RC, BM) sums of A[r + j] * x[token] over the tree of the elements [start, stop), at most LEAVES leaves."""
    rs, ks = r + tl.arange(0, RC), tl.arange(0, BK)
    x_rows = x + token[:, None] * x_stride
    a_rows = a + rs[:, None].to(tl.int64) * width
    some = rs[:, None] < r_end
    total = tl.zeros((RC, BM), tl.float32)
    pair = tl.zeros((RC, BM), tl.float32)
    acc = tl.zeros((RC, BM), tl.float32)
    for k in range(start, stop, BK):  # one loop, so that a leaf's loads are under way before the last one's are used
        at = (k + ks)[None, :]
        inside = at < stop
        xs = tl.trans(tl.load(x_rows + at, mask=live[:, None] & inside, other=0.0))
        acc = mma(tl.load(a_rows + at, mask=some & inside, other=0.0), xs, acc)
        if LEAVES == 2:
            full = (k + BK) % LEAF == 0
            pair += tl.where(full, acc, 0.0)
            acc = tl.where(full, 0.0, acc)
        else:
            if (k + BK) % LEAF == 0:  # here a branch takes fewer registers, and above a choice
                pair += acc
                acc = tl.zeros_like(acc)
            full = (k + BK) % (2 * LEAF) == 0
            total += tl.where(full, pair, 0.0)
            pair = tl.where(full, 0.0, pair)
    return total + (pair + acc)


@triton.jit
def shrink_rows(
    v, count, x, a, token, live, r0, r_end, rank, room, capacity, width, x_stride, start, stop,
    BM: tl.constexpr, RC: tl.constexpr, BK: tl.constexpr, LEAF: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """Rank rows [r0, r_end) of one term, for `count` tokens, into v; those from `rank` on are zeros."""
    for r in tl.range(r0, r_end, RC, disable_licm=True):
        stop_r = tl.minimum(r_end, rank)
        sums = dots(x, a, token, live, r, stop_r, width, x_stride, start, stop, BM, RC, BK, LEAF, LEAVES)
        if r < room:
            # In a block of its own, and not the range from 0 that `tile_tokens` has, so that the rows, 8 of a thread in
            # prefill, are not kept from one unit of work to the next.
            js, rs = tl.arange(BM, 2 * BM) - BM, r + tl.arange(0, RC)
            keep = (js < count)[:, None] & ((rs < r_end) & (rs < room))[None, :]
            tl.store(v + (js[:, None] * capacity + rs[None, :]), tl.trans(sums), mask=keep)


@triton.jit
def add_slices(
    v, count, columns, step, capacity, slices, leaves, BM: tl.constexpr, LEAVES: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Slice 0 <- the sum of all slices of `count` tokens, each of `leaves` leaves, at most LEAVES. The loads of a part
    are under way at once; where a slice is more than a leaf, those of its other leaves are masked, and zeros."""
    js, cs = tl.arange(0, BM), tl.arange(0, RANK_ALIGN)
    some = (js < count)[:, None]
    for c in tl.range(0, columns, RANK_ALIGN, disable_licm=True):
        at = v + (js[:, None] * capacity + (tl.multiple_of(c, RANK_ALIGN) + cs)[None, :])
        tl.store(at, add_columns(at, some, step, slices, leaves, BM, LEAVES, PART), mask=some)


@triton.jit
def add_columns(at, some, step, slices, leaves, BM: tl.constexpr, LEAVES: tl.constexpr, PART: tl.constexpr):
    """(BM, RANK_ALIGN) of `add_slices`; `at` points at those of slice 0."""
    total = tl.zeros((BM, RANK_ALIGN), tl.float32)
    if LEAVES == PART:
        for s in range(0, slices):
            total += tl.load(at + s * step, mask=some, other=0.0, cache_modifier=".cg")
    else:
        for part in range(0, slices * leaves, PART):
            pair = add_pair(at, part, some, step, slices, leaves)
            total += pair + add_pair(at, part + 2, some, step, slices, leaves)
    return total


@triton.jit
def add_and_keep(
    kept, v, count, x, arena, plan, table, t0, t1, rows, routes, token, live, step, capacity, slices, leaves, width,
    x_stride, BM: tl.constexpr, LEAF: tl.constexpr, LEAVES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """`add_slices` of the terms [t0, t1), whose sums also go to `kept`, (count, ranks of the terms side by side), times
    weight and scaling. Rank rows that v has no room for are computed here."""
    ranks = 0
    for t in tl.range(t0, t1, disable_licm=True):
        ranks += tl.load(read_row(plan, table, t, rows, routes) + RANK).to(tl.int32)
    col, to = 0, kept
    for t in tl.range(t0, t1, disable_licm=True):
        rank = tl.load(read_row(plan, table, t, rows, routes) + RANK).to(tl.int32)
        for c in tl.range(0, rank, RANK_ALIGN, disable_licm=True):
            if col + c < capacity:
                js, cs = tl.arange(0, BM), tl.arange(0, RANK_ALIGN)
                some = (js < count)[:, None]
                at = v + (js[:, None] * capacity + (tl.multiple_of(col + c, RANK_ALIGN) + cs)[None, :])
                total = add_columns(at, some, step, slices, leaves, BM, LEAVES, PART)
                tl.store(at, total, mask=some)
            else:
                a = tl.multiple_of(tl.load(read_row(plan, table, t, rows, routes) + A), ALIGN)
                again = compute_v(
                    x, arena + a, token, live, c, rank, width, x_stride, BM, RANK_ALIGN, LEAF, PART
                )  # fmt: skip
                total = tl.trans(again)
            scale = read_weight(plan, t, rows, routes) * read_scale(read_row(plan, table, t, rows, routes))
            js, cs = tl.arange(0, BM), c + tl.arange(0, RANK_ALIGN)
            mask = (js < count)[:, None] & (cs < rank)[None, :]
            tl.store(to + (js[:, None] * ranks + cs[None, :]), total * scale, mask=mask)
        col += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
        to += rank


@triton.jit
def add_pair(v, leaf, some, step, slices, leaves):
    return read_leaf(v, leaf, some, step, slices, leaves) + read_leaf(v, leaf + 1, some, step, slices, leaves)


@triton.jit
def read_leaf(v, leaf, some, step, slices, leaves):
    """The slice that begins with a leaf; zeros if none does."""
    s = leaf // leaves
    mask = some & (s * leaves == leaf) & (s < slices)
    return tl.load(v + s * step, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def divide(
    plan, table, rows, routes, length, width, BM: tl.constexpr, RC: tl.constexpr, LEAF: tl.constexpr
):  # fmt: skip
    """In decode, tokens of a tile and leaves of a slice: the smallest pieces of which there are not more than programs.
    Larger ones read A and store v less often; smaller ones need no rank rows divided, each part of which reads x."""
    most = tl.num_programs(0) * 16 // (tl.cdiv(width, LEAF) * 15)  # pieces of one leaf; as `grain_of` counts programs
    size, leaves = BM // 2, 1
    if total_units(plan, table, rows, routes, length, BM // 2, RC, RANKS) > most:
        size = BM
        if total_units(plan, table, rows, routes, length, BM, RC, RANKS) > most:
            leaves = 2
    return size, leaves


@triton.jit(do_not_specialize=["tokens"])
def shrink(
    v,  # fp32 (slices, tokens, capacity)
    arrived,  # int32 (tokens,), zeros before and after
    x,  # (tokens, in)
    arena, table, plan, tokens, width, x_stride, capacity,
    kept,  # fp32, as `training.apply_keep_` leaves it, or None
    BM: tl.constexpr,  # tokens of a tile, at most
    RC: tl.constexpr,  # rank rows at once
    BK: tl.constexpr,
    LEAF: tl.constexpr,
    LEAVES: tl.constexpr,  # of a slice, at most: 2, or PART
    PART: tl.constexpr,  # leaves of a part
):  # fmt: skip
    """v[0, t, col(e) + j] = A_e[j] . x[t] for the terms e of t's recipe; times w_e scale_e that goes to `kept`, too."""
    KEEP: tl.constexpr = kept is not None
    rows, routes, length = header(plan, tokens)
    if LEAVES == PART:
        size: tl.constexpr = BM
        leaves: tl.constexpr = LEAVES
    else:
        size, leaves = divide(plan, table, rows, routes, length, width, BM, RC, LEAF)
    slices = tl.cdiv(width, LEAF * leaves)
    grain = grain_of(total_units(plan, table, rows, routes, length, size, 1, RANKS) * slices)
    h, end = share_halves(total_units(plan, table, rows, routes, length, size, grain, RANKS) * slices)
    while tl.condition(h < end, disable_licm=True):
        rows, routes, length = header(plan, tokens)  # again, so that they need not be kept
        slices = tl.cdiv(width, LEAF * leaves)
        segment, within, _, units = locate(h // 2, slices, plan, table, rows, routes, length, size, grain, RANKS)
        block, q = within // units, within % units * 2 + h % 2
        q_end = tl.minimum(2 * units, q + end - h)
        tile, s = block // slices, block % slices
        token, live = tile_tokens(plan, segment, tile * size, rows, routes, length, BM)
        if LEAVES < PART:
            live = live & (tl.arange(0, BM) < size)
        position, count = tile_place(plan, segment, tile, routes, length, size)
        step = tokens.to(tl.int64) * capacity
        first = v + position.to(tl.int64) * capacity
        out = first + s * step
        start = s * (LEAF * leaves)
        stop = tl.minimum(start + LEAF * leaves, width)
        t0, t1 = segment_terms(plan, segment, rows, routes)
        passed, col = 0, 0
        for t in tl.range(t0, t1, disable_licm=True):
            row = read_row(plan, table, t, rows, routes)
            rank = tl.load(row + RANK).to(tl.int32)
            r0 = half_start(tl.maximum(q - passed, 0), grain)
            r1 = half_start(tl.maximum(q_end - passed, 0), grain)
            if r1 >= rank:  # the last rank rows come with the padding behind them, which `expand` reads
                r1 = tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
            a = tl.multiple_of(tl.load(row + A), ALIGN)
            if (r0 < r1) & (r0 < rank):
                shrink_rows(
                    out + col, count, x, arena + a, token, live, r0, r1, rank, capacity - col, capacity, width,
                    x_stride, start, stop, BM, RC, BK, LEAF, LEAVES,
                )  # fmt: skip
            passed += 2 * tl.cdiv(rank, grain)
            col += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
        if (slices > 1) | KEEP:
            tl.debug_barrier()  # all threads' stores come before the arrival, which releases them
            before = tl.atomic_add(arrived + position, q_end - q, sem="acq_rel", scope="gpu")
            if before + q_end - q == 2 * units * slices:
                if KEEP:
                    place = kept_place(plan, table, segment, tile * size, rows, routes, length)
                    add_and_keep(
                        kept + place, first, count, x, arena, plan, table, t0, t1, rows, routes, token, live, step,
                        capacity, slices, leaves, width, x_stride, BM, LEAF, LEAVES, PART,
                    )  # fmt: skip
                else:
                    columns = tl.minimum(col, capacity)
                    add_slices(first, count, columns, step, capacity, slices, leaves, BM, LEAVES, PART)
                tl.store(arrived + position, 0)
        h += q_end - q


@triton.jit
def grain_of(rank_rows):
    """Rank rows of a unit: a power of two at which the programs have about one unit each, if there are that many."""
    wanted = tl.cdiv(rank_rows * 15, tl.num_programs(0) * 16)
    grain = 1
    while grain < wanted:
        grain *= 2
    return grain


@triton.jit
def half_start(h, grain):
    """The first rank row of half unit h of a term."""
    return h // 2 * grain + h % 2 * ((grain + 1) // 2)
