"""Which program does what: every kernel reads the plan itself and takes an equal share of the work that is there.

A segment's tokens are cut into tiles. A tile's work is cut into units (rank rows, or columns), and the units
of all tiles are numbered through. Each program takes a run of total / n of them, one more if there are left-overs, so a
grid of fixed size has something to do in every program whenever there are as many units as programs, however few routes
there are, and no program is started for a slot, a rank or a capacity that the batch does not use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import layout

TABLE_WIDTH = tl.constexpr(layout.TABLE_WIDTH)
A = tl.constexpr(layout.A)
B = tl.constexpr(layout.B)
RANK = tl.constexpr(layout.RANK)
SCALE = tl.constexpr(layout.SCALE)
GAIN = tl.constexpr(layout.GAIN)
IN_GAIN = tl.constexpr(layout.IN_GAIN)
SHIFT = tl.constexpr(layout.SHIFT)
WHOLE = tl.constexpr(layout.WHOLE)
TURN = tl.constexpr(layout.TURN)  # followed by their shapes
IN_TURN = tl.constexpr(layout.IN_TURN)
HEADER = tl.constexpr(layout.PLAN_HEADER)

# What counts as a unit of work of a tile.
RANKS = tl.constexpr(0)  # `grain` rank rows of a term
TOUCHED = tl.constexpr(1)  # 1 if the route changes the module's output at all
ALL = tl.constexpr(2)  # 1, and the rows without a route are a segment of their own, the last

# Routes that are read at once. A warp's: with more, sums over them go through shared memory and cost 40 registers.
SPAN = tl.constexpr(32)
ALIGN = tl.constexpr(8)  # elements at a multiple of which parts start: 16 bytes of the 16-bit types; see `layout`
RANK_ALIGN = tl.constexpr(16)  # each term's columns of v start at a multiple of this
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
if INTERPRET.value:  # which, as of Triton 3.8, takes any `tl.condition` for true
    tl.condition.__bool__ = lambda self: bool(self.condition)


@triton.jit
def opaque(i):
    """i, int32, in a way that LLVM does not see through: where it sees a loop count, its strength reduction keeps a
    64-bit pointer for every access in the loop, 40 registers in `expand`; and what depends on i is not taken out."""
    if INTERPRET:
        return i
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def header(plan, tokens):
    """Rows, routes and tokens a row. A plan that routes nothing reads as one row without a route."""
    rows = tl.load(plan)
    routes = tl.where(rows == 0, 0, tl.load(plan + 1))
    rows = tl.where(routes == 0, 1, rows)
    return rows, routes, tokens // rows


@triton.jit
def measure(plan, table, p, rows, routes, length, size, grain, UNIT: tl.constexpr):
    """Of the segments p (a vector): how many tiles of `size` tokens each has, and how many units a tile."""
    routed = p < routes
    known = tl.where(routes > 0, routes + 1, 0)  # a plan without routes may have no row_start
    first = tl.load(plan + HEADER + p, mask=p < known, other=0)
    last = tl.load(plan + HEADER + p + 1, mask=routed, other=0)
    if UNIT == ALL:
        last = tl.where(p == routes, rows, last)
        units = (p <= routes).to(tl.int32)
    else:
        starts = plan + HEADER + routes + 1 + rows
        slots = starts + routes + 1
        t0 = tl.load(starts + p, mask=routed, other=0)
        t1 = tl.load(starts + p + 1, mask=routed, other=0)
        units = tl.zeros_like(p)
        for t in range(0, tl.max(t1 - t0, axis=0)):
            here = t0 + t < t1
            slot = tl.load(slots + t0 + t, mask=here, other=0).to(tl.int64)
            rank = tl.load(table + slot * TABLE_WIDTH + RANK, mask=here, other=0).to(tl.int32)
            if UNIT == RANKS:
                units += (rank + grain - 1) // grain
            else:
                gain = tl.load(table + slot * TABLE_WIDTH + GAIN, mask=here, other=-1)
                shift = tl.load(table + slot * TABLE_WIDTH + SHIFT, mask=here, other=-1)
                units = tl.maximum(units, ((rank > 0) | (gain >= 0) | (shift >= 0)).to(tl.int32))
    tiles = tl.where(last > first, ((last - first) * length + size - 1) // size, 0)
    return tiles, units


@triton.jit
def total_units(plan, table, rows, routes, length, size, grain, UNIT: tl.constexpr):
    """Tiles times units, over all segments."""
    total = 0
    for p0 in range(0, routes + (UNIT == ALL), SPAN):
        p = p0 + tl.arange(0, SPAN)
        tiles, units = measure(plan, table, p, rows, routes, length, size, grain, UNIT)
        total += tl.sum(tiles * units, axis=0)
    return total


@triton.jit
def locate(u, each, plan, table, rows, routes, length, size, grain, UNIT: tl.constexpr):
    """Where unit u lies, if each tile has `each` times its units: segment, unit within it, its tiles, units a tile."""
    segment, within, tiles_there, units_there = 0, 0, 1, 1
    base = 0
    for p0 in range(0, routes + (UNIT == ALL), SPAN):
        lane = tl.arange(0, SPAN)
        tiles, units = measure(plan, table, p0 + lane, rows, routes, length, size, grain, UNIT)
        count = tiles * units * each
        ends = base + tl.cumsum(count, axis=0)
        here = tl.sum((ends <= u).to(tl.int32), axis=0)
        end = base + tl.sum(count, axis=0)
        if (base <= u) & (u < end):
            segment = p0 + here
            within = u - base - tl.sum(tl.where(ends <= u, count, 0), axis=0)
            tiles_there = tl.sum(tl.where(lane == here, tiles, 0), axis=0)
            units_there = tl.sum(tl.where(lane == here, units, 0), axis=0)
        base = end
    return segment, within, tiles_there, units_there


@triton.jit
def share(total):
    """The units of this program."""
    i, n = tl.program_id(0), tl.num_programs(0)
    each, more = total // n, total % n
    return each * i + tl.minimum(i, more), each * (i + 1) + tl.minimum(i + 1, more)


@triton.jit
def share_halves(total):
    """The units of this program, in half units. Whole ones as long as there are enough of them; if there are fewer than
    programs, as many as are missing are divided between two programs."""
    i, n = tl.program_id(0), tl.num_programs(0)
    if total >= n:
        start, end = share(total)
        start, end = 2 * start, 2 * end
    else:
        halves = 2 * tl.minimum(n - total, total)
        start = tl.minimum(tl.where(i < halves, i, 2 * i - halves), 2 * total)
        end = tl.minimum(tl.where(i < halves, i + 1, 2 * i + 2 - halves), 2 * total)
    return start, end


@triton.jit
def tile_place(plan, segment, tile, routes, length, size):
    """Of a tile of a routed segment: how many tokens come before it in the order of the plan, and how many it has."""
    first, last = tl.load(plan + HEADER + segment), tl.load(plan + HEADER + segment + 1)
    return first * length + tile * size, tl.minimum((last - first) * length - tile * size, size)


@triton.jit
def kept_place(plan, table, segment, j0, rows, routes, length):
    """Where what is kept of a segment's tokens from the j0th on begins, route after route; int64."""
    place = tl.zeros((), tl.int64)
    for p0 in range(0, segment + 1, SPAN):
        p = p0 + tl.arange(0, SPAN)
        count, ranks = measure(plan, table, p, rows, routes, length, 1, 1, RANKS)
        before = tl.where(p < segment, count, tl.where(p == segment, j0, 0))
        place += tl.sum(before.to(tl.int64) * ranks, axis=0)
    return place


@triton.jit
def tile_tokens(plan, segment, j0, rows, routes, length, BM: tl.constexpr):
    """The tokens of a segment from its j0th on (BM,), and which of them exist."""
    first = tl.load(plan + HEADER + segment, mask=routes > 0, other=0)
    last = tl.where(segment == routes, rows, tl.load(plan + HEADER + segment + 1, mask=segment < routes, other=0))
    j = j0 + tl.arange(0, BM)
    live = j < (last - first) * length
    order = plan + HEADER + routes + 1 + first
    row = tl.load(order + j // length, mask=j < tl.where(routes > 0, (last - first) * length, 0), other=0)
    return tl.where(live, row * length + j % length, 0).to(tl.int64), live


@triton.jit
def segment_terms(plan, segment, rows, routes):
    """The terms [t0, t1) of a segment, none if it is that of the rows without a route."""
    starts = plan + HEADER + routes + 1 + rows
    routed = segment < routes
    return tl.load(starts + segment, mask=routed, other=0), tl.load(starts + segment + 1, mask=routed, other=0)


@triton.jit
def read_row(plan, table, t, rows, routes):
    """Pointer to the table's row of term t."""
    slot = tl.load(plan + HEADER + 2 * (routes + 1) + rows + t)
    return table + slot.to(tl.int64) * TABLE_WIDTH


@triton.jit
def read_weight(plan, t, rows, routes):
    terms = tl.load(plan + 2)
    return tl.load(plan + HEADER + 2 * (routes + 1) + rows + terms + t).to(tl.float32, bitcast=True)


@triton.jit
def read_scale(row):
    return tl.load(row + SCALE).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def mma(a, b, acc):
    """acc + a b, accumulated in fp32 whatever a and b are stored in; on tensor cores for 16-bit operands.

    Of one in 16 bits beside fp32 both are fp32. The interpreter multiplies bfloat16 as the integers that hold it, so
    there operands are widened, too.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def mma_wide(b, v, acc):
    """acc + b v, where v is fp32 and b is stored in 16 bits, to fp32 accuracy on tensor cores.

    b is exact in tf32, and v is a sum of two tf32 numbers up to 2^-22 of it: rounding v to 16 bits would double the
    error of the whole operator, and overflow in float16.
    """
    if b.dtype == tl.float32:
        return mma(b, v, acc)
    wide = b.to(tl.float32)
    high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 13 mantissa bits off
    for part in range(2):  # two products side by side would be taken for a chain, and lie twice in the warps
        acc = tl.dot(wide, tl.where(part == 0, high, v - high), acc, input_precision="tf32")
    return acc
