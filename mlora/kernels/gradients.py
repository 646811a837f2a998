"""The gradients of rank rows: sums over an adapter's tokens of (rank row, column) products, in one launch.

Work is divided by adapter, rank rows and columns, and never by tokens, so no two programs add to one element. An
element is one chain over the tokens of a segment, 64 tokens from the start of their route on, and the segments' sums
are added in order: its bits depend on nothing but the adapter's own tokens.

v: fp32, route after route of the plan, (tokens of the route, ranks of its terms side by side), as
`training.apply_keep_` leaves it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .work import (
    HEADER,
    RANK,
    SPAN,
    TABLE_WIDTH,
    header,
    mma_wide,
    segment_terms,
    share,
    tile_tokens,
)


@triton.jit
def slot_tiles(table, offsets, slots, s, BR: tl.constexpr):
    """Tiles of BR rank rows of the slots s (a vector) whose gradients are wanted."""
    here = s < slots
    wanted = here & (tl.load(offsets + s, mask=here, other=-1) >= 0)
    rank = tl.load(table + s.to(tl.int64) * TABLE_WIDTH + RANK, mask=wanted, other=0).to(tl.int32)
    return (rank + BR - 1) // BR


@triton.jit
def total_tiles(table, offsets, slots, BR: tl.constexpr):
    total = 0
    for s0 in range(0, slots, SPAN):
        total += tl.sum(slot_tiles(table, offsets, slots, s0 + tl.arange(0, SPAN), BR), axis=0)
    return total


@triton.jit
def locate_tile(u, table, offsets, slots, BR: tl.constexpr):
    """Where tile u of all slots' lies: the slot, and the tile within it."""
    slot, within, base = 0, 0, 0
    for s0 in range(0, slots, SPAN):
        count = slot_tiles(table, offsets, slots, s0 + tl.arange(0, SPAN), BR)
        ends = base + tl.cumsum(count, axis=0)
        end = base + tl.sum(count, axis=0)
        if (base <= u) & (u < end):
            slot = s0 + tl.sum((ends <= u).to(tl.int32), axis=0)
            within = u - base - tl.sum(tl.where(ends <= u, count, 0), axis=0)
        base = end
    return slot, within


@triton.jit
def route_sizes(plan, table, p, rows, routes, length, slot):
    """Of the routes p (a vector): their tokens, the ranks of their terms added up, and whether `slot` is a term."""
    here = p < routes
    first = tl.load(plan + HEADER + p, mask=here, other=0)
    count = (tl.load(plan + HEADER + p + 1, mask=here, other=0) - first) * length
    starts = plan + HEADER + routes + 1 + rows
    slots = starts + routes + 1
    t0 = tl.load(starts + p, mask=here, other=0)
    t1 = tl.load(starts + p + 1, mask=here, other=0)
    ranks, mine = tl.zeros_like(p), tl.zeros_like(p)
    for t in range(0, tl.max(t1 - t0, axis=0)):
        own = tl.load(slots + t0 + t, mask=t0 + t < t1, other=-1)
        at = table + own.to(tl.int64) * TABLE_WIDTH + RANK
        ranks += tl.load(at, mask=t0 + t < t1, other=0).to(tl.int32)
        mine = tl.maximum(mine, (own == slot).to(tl.int32))
    return count, ranks, (mine > 0) & (count > 0)


@triton.jit
def pick(values, lane, i):
    """values[i]."""
    return tl.sum(tl.where(lane == i, values, 0), axis=0)


@triton.jit
def add_route(
    total, v, source, plan, segment, rows, routes, length, count, ranks, j, rank, cols, some, stride,
    BT: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """total (BN, BR) + the sums over the `count` tokens of a route. v: of its first token and the term's first rank
    row, `ranks` apart; `j` are rank rows."""
    ts = tl.arange(0, BT)
    acc = tl.zeros_like(total)
    for t0 in range(0, count, BT):
        token, live = tile_tokens(plan, segment, t0, rows, routes, length, BT)
        at = source + token[None, :] * stride + cols[:, None]
        values = tl.load(at, mask=live[None, :] & some[:, None], other=0.0)
        own = v + (t0 + ts).to(tl.int64)[:, None] * ranks + j[None, :]
        weights = tl.load(own, mask=live[:, None] & (j < rank)[None, :], other=0.0)
        acc = mma_wide(values, weights, acc)
        if (t0 + BT) % SEGMENT == 0:
            total += acc
            acc = tl.zeros_like(acc)
    return total + acc


@triton.jit(do_not_specialize=["tokens", "slots"])
def rank_gradients(
    to,  # fp32 (elements,)
    v,  # fp32, as above
    source,  # (tokens, width), of which the columns are
    offsets,  # int64 (slots,), -1 where no gradient is wanted
    table, plan, tokens, slots, width, stride,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,  # tokens at once, a part of SEGMENT
    SEGMENT: tl.constexpr,  # tokens of a chain
):  # fmt: skip
    """to[offsets[slot] + j * width + n] = sum_t v[t, j] * source[t, n] over the tokens t of all terms of each slot."""
    columns = tl.cdiv(width, BN)
    u, end = share(total_tiles(table, offsets, slots, BR) * columns)
    while tl.condition(u < end, disable_licm=True):
        rows, routes, length = header(plan, tokens)  # again, so that they need not be kept
        slot, tile = locate_tile(u // columns, table, offsets, slots, BR)
        rank = tl.load(table + slot.to(tl.int64) * TABLE_WIDTH + RANK).to(tl.int32)
        cols = u % columns * BN + tl.arange(0, BN)
        some = cols < width
        j = tile * BR + tl.arange(0, BR)
        u += 1
        total = tl.zeros((BN, BR), tl.float32)
        base = tl.zeros((), tl.int64)  # of the routes' parts of v
        met = 0
        for p0 in tl.range(0, routes, SPAN, disable_licm=True):
            lane = tl.arange(0, SPAN)
            count, ranks, mine = route_sizes(plan, table, p0 + lane, rows, routes, length, slot)
            part = count.to(tl.int64) * ranks
            starts = base + tl.cumsum(part, axis=0) - part
            last = -1
            for _ in tl.range(0, tl.sum(mine.to(tl.int32), axis=0), disable_licm=True):
                last = tl.min(tl.where(mine & (lane > last), lane, SPAN), axis=0)  # the next route that has the slot
                t0, t1 = segment_terms(plan, p0 + last, rows, routes)
                first = v + pick(starts, lane, last)
                own, step = pick(count, lane, last), pick(ranks, lane, last)
                for t in tl.range(t0, t1, disable_licm=True):
                    other = tl.load(plan + HEADER + 2 * (routes + 1) + rows + t)
                    if other == slot:
                        total = add_route(
                            total, first, source, plan, p0 + last, rows, routes, length, own, step, j, rank, cols, some,
                            stride, BT, SEGMENT,
                        )  # fmt: skip
                    first += tl.load(table + other.to(tl.int64) * TABLE_WIDTH + RANK)
                met += 1
            base += tl.sum(part, axis=0)
        if met > 0:
            at = to + tl.load(offsets + slot) + j.to(tl.int64)[None, :] * width + cols[:, None]
            tl.store(at, total, mask=some[:, None] & (j < rank)[None, :])
