"""The LoRA product in two launches: `shrink` leaves v = A x in a workspace, `expand` adds B^T v to y.

The sum over `in` is a tree that depends on `in` alone: chains over leaves of `config.leaf(in)` elements, PART
consecutive leaves added in order to a part, the parts added in order. Each program of `shrink` makes one leaf (few
tokens) or one part (many) of some tokens and rank rows, and the program that is the last to leave something of a
tile of tokens adds up the tile's slices, in the order of the tree whichever program that is. So the tile sizes, the
grid and the rest of the batch never change a row's bits. Who is the last is told by a counter for each tile, which is
0 before and after the launch: an integer, no sum of floats depends on the order of arrivals.

v: fp32 (slices, tokens, capacity), tokens in the order of the plan. Slice s holds part s, or leaf s, and at the end
slice 0 holds the sum. The rank rows of a recipe's terms lie side by side, each term's from a multiple of 16 on, with
zeros up to the next. Those beyond `capacity` are not kept: `expand` computes them again in every tile of columns, which
is slow and right.
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
    share_halves,
    tile_place,
    tile_tokens,
    total_units,
)

ALIGN = tl.constexpr(8)  # elements at a multiple of which parts start: 16 bytes of the 16-bit types; see `layout`


@triton.jit
def dots(
    x, a, token, live, r, r_end, width, x_stride, start, stop,
    BM: tl.constexpr, RC: tl.constexpr, BK: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """(RC, BM) sums of A[r + j] * x[token] over the leaves of the elements [start, stop), added in order."""
    rs, ks = r + tl.arange(0, RC), tl.arange(0, BK)
    x_rows = x + token[:, None] * x_stride
    a_rows = a + rs[:, None].to(tl.int64) * width
    some = rs[:, None] < r_end
    total = tl.zeros((RC, BM), tl.float32)
    acc = tl.zeros((RC, BM), tl.float32)
    for k in range(start, stop, BK):  # one loop, so that a leaf's loads are under way before the last one's are used
        at = (k + ks)[None, :]
        inside = at < stop
        xs = tl.trans(tl.load(x_rows + at, mask=live[:, None] & inside, other=0.0))
        acc = mma(tl.load(a_rows + at, mask=some & inside, other=0.0), xs, acc)
        full = (k + BK) % LEAF == 0
        total += tl.where(full, acc, 0.0)
        acc = tl.where(full, 0.0, acc)
    return total + acc


@triton.jit
def shrink_rows(
    v, count, x, a, token, live, r0, r_end, rank, room, capacity, width, x_stride, start, stop,
    BM: tl.constexpr, RC: tl.constexpr, BK: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Rank rows [r0, r_end) of one term, for `count` tokens, into v; those from `rank` on are zeros."""
    for r in tl.range(r0, r_end, RC, disable_licm=True):
        sums = dots(x, a, token, live, r, tl.minimum(r_end, rank), width, x_stride, start, stop, BM, RC, BK, LEAF)
        js, rs = tl.arange(0, BM), r + tl.arange(0, RC)
        keep = (js < count)[:, None] & ((rs < r_end) & (rs < room))[None, :]
        tl.store(v + (js[:, None] * capacity + rs[None, :]), tl.trans(sums), mask=keep)


@triton.jit
def add_slices(
    v, count, columns, step, capacity, slices, BM: tl.constexpr, WITHIN: tl.constexpr
):  # fmt: skip
    """Slice 0 <- the sum of all slices of `count` tokens, WITHIN consecutive ones at first."""
    js, cs = tl.arange(0, BM), tl.arange(0, RANK_ALIGN)
    some = (js < count)[:, None]
    for c in tl.range(0, columns, RANK_ALIGN, disable_licm=True):
        at = v + tl.multiple_of(c, RANK_ALIGN) + (js[:, None] * capacity + cs[None, :])
        total = tl.zeros((BM, RANK_ALIGN), tl.float32)
        for part in range(0, slices, WITHIN):
            acc = tl.zeros((BM, RANK_ALIGN), tl.float32)
            for s in range(part, tl.minimum(part + WITHIN, slices)):
                acc += tl.load(at + s * step, mask=some, other=0.0, cache_modifier=".cg")
            total += acc
        tl.store(at, total, mask=some)


@triton.jit(do_not_specialize=["tokens"])
def shrink(
    v,  # fp32 (slices, tokens, capacity)
    arrived,  # int32 (tokens,), zeros before and after
    x,  # (tokens, in)
    arena, table, plan, tokens, width, x_stride, capacity,
    BM: tl.constexpr,  # tokens of a tile
    RC: tl.constexpr,  # rank rows at once
    BK: tl.constexpr,
    LEAF: tl.constexpr,
    LEAVES: tl.constexpr,  # of a slice: 1, or PART
    PART: tl.constexpr,  # leaves of a part
):  # fmt: skip
    """v[0, t, col(e) + j] = A_e[j] . x[t] for the terms e of t's recipe."""
    rows, routes, length = header(plan, tokens)
    slices = tl.cdiv(width, LEAF * LEAVES)
    grain = grain_of(total_units(plan, table, rows, routes, length, BM, 1, RANKS) * slices)
    h, end = share_halves(total_units(plan, table, rows, routes, length, BM, grain, RANKS) * slices)
    while tl.condition(h < end, disable_licm=True):
        segment, within, _, units = locate(h // 2, slices, plan, table, rows, routes, length, BM, grain, RANKS)
        block, q = within // units, within % units * 2 + h % 2
        q_end = tl.minimum(2 * units, q + end - h)
        tile, s = block // slices, block % slices
        token, live = tile_tokens(plan, segment, tile, rows, routes, length, BM)
        position, count = tile_place(plan, segment, tile, routes, length, BM)
        step = tokens.to(tl.int64) * capacity
        first = v + position.to(tl.int64) * capacity
        out = first + s * step
        start = s * (LEAF * LEAVES)
        stop = tl.minimum(start + LEAF * LEAVES, width)
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
                    x_stride, start, stop, BM, RC, BK, LEAF,
                )  # fmt: skip
            passed += 2 * tl.cdiv(rank, grain)
            col += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
        if slices > 1:
            tl.debug_barrier()  # all threads' stores come before the arrival, which releases them
            before = tl.atomic_add(arrived + position, q_end - q, sem="acq_rel", scope="gpu")
            if before + q_end - q == 2 * units * slices:
                add_slices(first, count, tl.minimum(col, capacity), step, capacity, slices, BM, PART // LEAVES)
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
    """What `read_v` returns, for rank rows that the workspace has no room for. Steps of 16 elements need few registers
    and keep the chains of `shrink`: 16 is what a tensor-core instruction takes."""
    total = tl.zeros((RE, BM), tl.float32)
    for start in range(0, width, LEAF * PART):
        stop = tl.minimum(start + LEAF * PART, width)
        total += dots(x, a, token, live, r, rank, width, x_stride, start, stop, BM, RE, 16, LEAF)
    return total


@triton.jit
def read_b(arena, b, r, rank, cols, some, width_out, RE: tl.constexpr):
    """(BN, RE) of B."""
    rs = r + tl.arange(0, RE)
    at = rs[None, :].to(tl.int64) * width_out + cols[:, None]
    mask = (rs < rank)[None, :] & some[:, None]
    return tl.load(arena + tl.multiple_of(b, ALIGN) + at, mask=mask, other=0.0)


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
def first_rank(plan, table, t0, t1, rows, routes):
    """The rank of the first of the terms [t0, t1), 0 if there is none, and where its A is."""
    rank, a = 0, tl.zeros((), tl.int64)
    if t0 < t1:
        row = read_row(plan, table, t0, rows, routes)
        rank, a = tl.load(row + RANK).to(tl.int32), tl.load(row + A)
    return rank, a


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
    PART: tl.constexpr,
    GRAIN: tl.constexpr,  # columns of a unit of work
):  # fmt: skip
    """y[t] += gain * base[t] + sum_e w_e (scale_e B_e^T v[t, e] + shift_e) over the terms e of t's recipe."""
    rows, routes, length = header(plan, tokens)
    grains = tl.cdiv(width_out, GRAIN)
    u, end = share(total_units(plan, table, rows, routes, length, BM, GRAIN, TOUCHED) * grains)
    while tl.condition(u < end, disable_licm=True):
        segment, within, _, _ = locate(u, grains, plan, table, rows, routes, length, BM, GRAIN, TOUCHED)
        tile, g = within // grains, within % grains
        g_end = tl.minimum(grains, g + end - u)
        token, live = tile_tokens(plan, segment, tile, rows, routes, length, BM)
        t0, t1 = segment_terms(plan, segment, rows, routes)
        first, _ = first_rank(plan, table, t0, t1, rows, routes)
        position, count = tile_place(plan, segment, tile, routes, length, BM)
        own = v + position.to(tl.int64) * capacity
        kept0 = read_v(own, count, 0, first, capacity, BM, RE)  # for most adapters all there is
        kept1 = read_v(own, count, RE, first, capacity, BM, RE)
        kept2 = read_v(own, count, 2 * RE, first, capacity, BM, RE)
        kept3 = read_v(own, count, 3 * RE, first, capacity, BM, RE)
        stop = tl.minimum(g_end * GRAIN, width_out)
        for n in tl.range(g * GRAIN, stop, BN, disable_licm=True):
            cols = n + tl.arange(0, BN)
            some = cols < stop
            mask = live[None, :] & some[:, None]
            at = y + token[None, :] * y_stride + cols[:, None]
            acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            gain = sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, GAIN, BN)
            if tl.max(tl.abs(gain), axis=0) > 0:
                source = tl.load(base + token[None, :] * base_stride + cols[:, None], mask=mask, other=0.0)
                acc += gain[:, None] * source.to(tl.float32)
            acc += sum_gains(arena, plan, table, t0, t1, rows, routes, cols, some, SHIFT, BN)[:, None]
            col = 0
            for t in tl.range(t0, t1, disable_licm=True):
                row = read_row(plan, table, t, rows, routes)
                rank = tl.load(row + RANK).to(tl.int32)
                scale = read_weight(plan, t, rows, routes) * read_scale(row)
                b = tl.load(row + B)
                for r in tl.range(0, rank, RE, disable_licm=True):
                    if (t == t0) & (r < 4 * RE):
                        vs = tl.where(r < 2 * RE, tl.where(r < RE, kept0, kept1), tl.where(r < 3 * RE, kept2, kept3))
                    elif col + r + RE <= capacity:
                        vs = read_v(own + tl.multiple_of(col, RANK_ALIGN), count, r, rank, capacity, BM, RE)
                    else:
                        a = arena + tl.load(row + A)
                        vs = compute_v(x, a, token, live, r, rank, width, x_stride, BM, RE, LEAF, PART)
                    acc = mma_wide(read_b(arena, b, r, rank, cols, some, width_out, RE), vs * scale, acc)
                col += tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN
            tl.store(at, acc.to(y.dtype.element_ty), mask=mask)
        u += g_end - g
