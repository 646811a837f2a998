"""Which launches each operator makes. `operators.py` runs them; the ahead-of-time compiler and the static counts read
them. Nothing here reads the contents of a tensor: what is launched depends on shapes only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import config, dropout, embed, expand, gradients, merge, shrink, turn
from . import linear as fused
from .config import Device

# What the interpreter pretends to run on. Few programs, since it runs them one after another.
INTERPRETED = Device(processors=4, capability=90)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[(grid,)](*args, **constants, **options)`."""

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    registers: int = 80

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Whether products and sums fuse is said here, since Triton's default is changing; as many
        registers are offered as keep ptxas from spilling to fit more blocks on a processor."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        return {**options, "enable_fp_fusion": True}

    def run(self) -> None:
        self.kernel[(self.grid,)](*self.args, **self.constants, **self.options)


@functools.cache
def _properties(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, 10 * properties.major + properties.minor)


def device_of(t: Tensor) -> Device:
    return _properties(t.device.index) if t.is_cuda else INTERPRETED


def _workspace(x: Tensor) -> tuple[Tensor, int]:
    """The v of `shrink`, uninitialized, and its capacity."""
    tokens, width = x.shape
    capacity = config.capacity(tokens, width)
    slices = config.slices(width, config.form(tokens).least)
    return x.new_empty((slices, tokens, capacity), dtype=torch.float32), capacity


def apply_launches(
    y: Tensor,
    base: Tensor | None,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    plan: Tensor,
    arrived: Tensor,
    device: Device,
    kept: Tensor | None = None,
) -> list[Launch]:
    """The launches of `apply_` on y (tokens, out), base (tokens, out) or None, x (tokens, in); with `kept` those of
    `apply_keep_`. `arrived` is int32, (tokens,), zeros, and for no other launch at the same time."""
    tokens, width = x.shape
    f, leaf = config.form(tokens), config.leaf(width)
    v, capacity = _workspace(x)
    source = y if base is None else base
    first_sizes = {
        "BM": f.shrink_tokens,
        "RC": f.ranks,
        "BK": config.block_k(arena.itemsize),
        "LEAF": leaf,
        "LEAVES": f.leaves,
        "PART": config.PART,
    }
    second_sizes = {
        "BM": f.expand_tokens,
        "BN": f.columns,
        "RE": config.RANKS,
        "WIDE": config.expand_wide(device, f, arena.itemsize),
        "FAR": config.far(arena.numel()),
        "LEAF": leaf,
        "PART": config.PART,
        "GRAIN": f.expand_grain,
    }
    adapters = (arena, table, plan, tokens, width)
    grids = config.shrink_grid(device, tokens, width), config.expand_grid(device, tokens, y.shape[1])
    strides = (x.stride(0), y.stride(0), source.stride(0))
    registers = config.expand_registers(device, f, arena.itemsize)
    first = (v, arrived, x, *adapters, x.stride(0), capacity, kept)
    second = (y, source, v, x, *adapters, y.shape[1], *strides, capacity)
    return [
        Launch(
            shrink.shrink,
            grids[0],
            first,
            first_sizes,
            f.shrink_warps,
            config.SHRINK_STAGES,
            config.shrink_registers(kept is not None, x.dtype is not arena.dtype),
        ),
        Launch(expand.expand, grids[1], second, second_sizes, f.expand_warps, 1, registers),
    ]


def linear_launches(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arena: Tensor,
    table: Tensor,
    plan: Tensor,
    device: Device,
) -> list[Launch]:
    """The launch of `linear` on y (tokens, out), contiguous, and x (tokens, in)."""
    tokens, width = x.shape
    bm, bn, bk, warps, depth, registers = config.linear_tiles(device, tokens, x.itemsize, x.dtype is not arena.dtype)
    constants = {"HAS_BIAS": bias is not None, "BM": bm, "BN": bn, "RE": config.RANKS, "BK": bk}
    constants["FAR"] = config.far(arena.numel())
    args = (
        y, x, weight, weight if bias is None else bias, arena, table, plan, tokens, width, weight.shape[0],
        x.stride(0), weight.stride(0),
    )  # fmt: skip
    grid = config.linear_grid(device, tokens, weight.shape[0], bm, bn, warps, registers)
    return [Launch(fused.linear, grid, args, constants, warps, depth, registers)]


def turn_launches(
    out: Tensor, x: Tensor, base: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor, device: Device
) -> list[Launch]:
    """The launch of `scale_input` on x (tokens, width) and out, contiguous, or with a `base` that of `turn_output`."""
    tokens, width = x.shape
    bm, bn = 16 // x.itemsize, 256  # a 128-bit access of each thread
    tiles = -(-tokens // bm) * -(-width // bn)
    to = x if base is None else base
    args = (out, x, to, arena, table, plan, tokens, width, x.stride(0), to.stride(0))
    constants = {"OUTPUT": base is not None, "BM": bm, "BN": bn}
    return [Launch(turn.turn, min(device.processors * 4, tiles), args, constants, warps=8)]


def embed_launches(
    y: Tensor, ids: Tensor, arena: Tensor, table: Tensor, plan: Tensor, vocab: int, device: Device
) -> list[Launch]:
    """The launch of `embed_` on y (tokens, out) and ids (tokens,)."""
    tokens, width_out = y.shape
    bm, bn = 8, 128
    tiles = -(-tokens // bm) * -(-width_out // bn)
    args = (y, ids, arena, table, plan, tokens, vocab, width_out, y.stride(0))
    return [Launch(embed.embed, min(device.processors * 4, tiles), args, {"BM": bm, "BN": bn})]


def gradient_launches(
    to: Tensor, v: Tensor, rows: Tensor, offsets: Tensor, table: Tensor, plan: Tensor, device: Device
) -> list[Launch]:
    """The launch of `rank_gradients_` on rows (tokens, width)."""
    tokens, width = rows.shape
    br, bn, bt, warps, registers = config.gradient_tiles(rows.itemsize)
    args = (to, v, rows, offsets, table, plan, tokens, len(table), width, rows.stride(0))
    constants = {"BR": br, "BN": bn, "BT": bt, "SEGMENT": config.SEGMENT}
    grid = config.gradient_grid(device, v.numel(), width, bn, warps, registers)
    return [Launch(gradients.rank_gradients, grid, args, constants, warps, 1, registers)]


def drop_launches(y: Tensor, x: Tensor, places: Tensor, odds: Tensor) -> list[Launch]:
    """The launch of `drop` on x (tokens, width) and y, contiguous: a program for each tile."""
    tokens, width = x.shape
    bm, bn = 8, 128
    args = (y, x, places, odds, tokens, tokens // len(places), width, x.stride(0))
    return [Launch(dropout.drop, -(-tokens // bm) * -(-width // bn), args, {"BM": bm, "BN": bn})]


def merge_launches(weight: Tensor, source: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> list[Launch]:
    """The launch of `merge_`: a program for each tile of the weight."""
    width_out, width = weight.shape
    bm, bn = 64, 64 if arena.itemsize == 2 else 32
    args = (weight, source, arena, table, plan, width_out, width, weight.stride(0), source.stride(0))
    grid = -(-width_out // bm) * -(-width // bn)
    return [Launch(merge.merge, grid, args, {"BM": bm, "BN": bn, "RE": config.RANKS}, 8, 2)]
