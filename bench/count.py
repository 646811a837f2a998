"""What `apply_` does on a given batch, counted without running it: programs, those without work, and bytes asked for.

The walk mirrors the kernels' own, unit by unit; tests compare it with what the interpreter sees.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor

from mlora import layout
from mlora.kernels import config
from mlora.kernels.config import Device
from mlora.ops import reference

_RANK_ALIGN = 16


@dataclass
class Count:
    """One launch.

    Args:
        grid: programs started. idle: those that find no unit of work.
        loads, stores: tensor -> bytes that unmasked lanes ask for, re-reads included: "x", "a", "b", "v", "y". The
            plan, the table, gains and shifts are left out.
    """

    name: str
    grid: int
    idle: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)

    def load(self, name: str, nbytes: int) -> None:
        self.loads[name] = self.loads.get(name, 0) + nbytes

    def store(self, name: str, nbytes: int) -> None:
        self.stores[name] = self.stores.get(name, 0) + nbytes


def _shares(total: int, grid: int) -> list[tuple[int, int]]:
    each, more = divmod(total, grid)
    starts = [each * i + min(i, more) for i in range(grid + 1)]
    return list(itertools.pairwise(starts))


def _pad(rank: int) -> int:
    return -(-rank // _RANK_ALIGN) * _RANK_ALIGN


def count_apply(
    plan: Tensor, table: Tensor, tokens: int, width: int, width_out: int, itemsize: int, device: Device
) -> list[Count]:
    """The launches of `apply_` without `base`: plan and table as in `layout`, in host memory; `itemsize` in bytes."""
    routes = reference.routes(plan, table, tokens)
    return [
        _count_shrink(routes, tokens, width, itemsize, device),
        _count_expand(routes, tokens, width, width_out, itemsize, device),
    ]


def _halves(total: int, grid: int) -> list[tuple[int, int]]:
    """`work.share_halves` of every program."""
    if total >= grid:
        return [(2 * start, 2 * end) for start, end in _shares(total, grid)]
    halves = 2 * min(grid - total, total)
    starts = [min(i if i < halves else 2 * i - halves, 2 * total) for i in range(grid + 1)]
    return list(itertools.pairwise(starts))


def _half_start(h: int, grain: int) -> int:
    return h // 2 * grain + h % 2 * ((grain + 1) // 2)


def _divide(routes: list[reference.Route], width: int, f: config.Form, grid: int) -> tuple[int, int]:
    """`shrink.divide`: tokens of a tile and leaves of a slice."""
    if f.leaves == config.PART:
        return f.shrink_tokens, f.leaves
    most = grid * 16 // (config.slices(width, 1) * 15)
    for size in (f.shrink_tokens // 2, f.shrink_tokens):
        if sum(-(-len(r.tokens) // size) * sum(-(-t.rank // f.ranks) for t in r.terms) for r in routes) <= most:
            return size, f.least
    return f.shrink_tokens, f.leaves


def _count_shrink(routes: list[reference.Route], tokens: int, width: int, itemsize: int, device: Device) -> Count:
    f = config.form(tokens)
    result = Count("shrink", config.shrink_grid(device, tokens, width))
    size, leaves = _divide(routes, width, f, result.grid)
    slices = config.slices(width, leaves)
    length = config.leaf(width) * leaves
    capacity = config.capacity(tokens, width)
    tiles: list[tuple[int, list[int]]] = []  # tokens, ranks of the terms
    for route in routes:
        ranks = [t.rank for t in route.terms]
        tiles += [(min(size, len(route.tokens) - start), ranks) for start in range(0, len(route.tokens), size)]
    wanted = -(-sum(sum(ranks) for _, ranks in tiles) * slices * 15 // (result.grid * 16))
    grain = 1
    while grain < wanted:
        grain *= 2
    blocks = [  # tokens, elements of `in`, ranks, half units
        (rows, min(length, width - s * length), ranks, 2 * units)
        for rows, ranks in tiles
        if (units := sum(-(-rank // grain) for rank in ranks))
        for s in range(slices)
    ]
    if slices > 1:
        for rows, ranks in tiles:  # whoever is last adds them up
            columns = min(capacity, sum(map(_pad, ranks)))
            result.load("v", slices * rows * columns * 4)
            result.store("v", rows * columns * 4)
    index, before = 0, 0
    for h, end in _halves(sum(halves for *_, halves in blocks) // 2, result.grid):
        worked = False
        while h < end:
            while h >= before + blocks[index][3]:
                before += blocks[index][3]
                index += 1
            rows, elements, ranks, halves = blocks[index]
            q, q_end = h - before, min(halves, end - before)
            passed = col = 0
            for rank in ranks:
                r0 = _half_start(max(q - passed, 0), grain)
                r1 = _half_start(max(q_end - passed, 0), grain)
                if r1 >= rank:
                    r1 = _pad(rank)
                if r0 < min(r1, rank):
                    worked = True
                    result.load("x", -(-(r1 - r0) // f.ranks) * rows * elements * itemsize)
                    result.load("a", (min(r1, rank) - r0) * elements * itemsize)
                    result.store("v", max(0, min(col + r1, capacity) - col - r0) * rows * 4)
                passed += 2 * -(-rank // grain)
                col += _pad(rank)
            h += q_end - q
        result.idle += not worked
    return result


def _count_expand(
    routes: list[reference.Route], tokens: int, width: int, width_out: int, itemsize: int, device: Device
) -> Count:
    f = config.form(tokens)
    result = Count("expand", config.expand_grid(device, tokens, width_out))
    capacity = config.capacity(tokens, width)
    grains = -(-width_out // f.expand_grain)
    tiles: list[tuple[int, list[int]]] = []
    for route in routes:
        if any(t.rank or t.gain >= 0 or t.shift >= 0 for t in route.terms):
            for start in range(0, len(route.tokens), f.expand_tokens):
                tiles.append((min(f.expand_tokens, len(route.tokens) - start), [t.rank for t in route.terms]))
    kept = 4 * config.RANKS
    for u, end in _shares(len(tiles) * grains, result.grid):
        result.idle += u == end
        while u < end:
            (rows, ranks), g = tiles[u // grains], u % grains
            g_end = min(grains, g + end - u)
            stop = min(g_end * f.expand_grain, width_out)
            fits = sum(map(_pad, ranks)) <= capacity
            if fits:
                result.load("v", rows * min(kept, _pad(ranks[0])) * 4)
            for n in range(g * f.expand_grain, stop, f.columns):
                columns = min(f.columns, stop - n)
                result.load("y", rows * columns * itemsize)
                result.store("y", rows * columns * itemsize)
                result.load("b", sum(ranks) * columns * itemsize)
                for term, rank in enumerate(ranks):
                    if fits:
                        result.load("v", rows * max(0, _pad(rank) - kept * (term == 0)) * 4)
                    else:  # `expand` computes them again
                        result.load("x", -(-rank // config.RANKS) * rows * width * itemsize)
                        result.load("a", rank * width * itemsize)
            u += g_end - g
    return result


def lower_bound(plan: Tensor, table: Tensor, tokens: int, width: int, width_out: int, itemsize: int) -> int:
    """Bytes that any unfused LoRA operator has to move: x and y of the routed tokens, each adapter once."""
    routes = reference.routes(plan, table, tokens)
    slots = {t.slot for route in routes for t in route.terms}
    ranks = sum(int(table[slot, layout.RANK]) for slot in slots)
    routed = sum(len(route.tokens) for route in routes)
    return (routed * (width + 2 * width_out) + ranks * (width + width_out)) * itemsize
