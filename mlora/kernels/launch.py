"""The operators on tensors that the kernels can read: which launches each makes, and the calls themselves.

`*_launches` say what would be launched, and are what the ahead-of-time compiler and the static counts read; the
operators run them. Nothing here reads the contents of a tensor, so nothing waits for the device, and shapes depend on
shapes only. The plan and the table are trusted: what `reference.routes` refuses is undefined here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import layout
from . import config, gains, lora, merge, work
from . import linear as fused
from .config import Device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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
    registers: int = 255

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


def _run(launches: Sequence[Launch], where: Tensor) -> None:
    if where.is_cuda:
        with torch.cuda.device(where.device):
            for launch in launches:
                launch.run()
    elif work.INTERPRET.value:
        for launch in launches:
            launch.run()
    else:
        raise RuntimeError("mlora: Triton kernels take CPU tensors in the interpreter only (TRITON_INTERPRET=1)")


def _flat(name: str, t: Tensor) -> Tensor:
    """(tokens, width) with unit stride within a row, copied if it must be."""
    if t.dim() < 1 or t.shape[-1] == 0:
        raise RuntimeError(f"mlora: {name} must have a last dimension, is {tuple(t.shape)}")
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _check(arena: Tensor, table: Tensor, plan: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype is not arena.dtype:
            raise RuntimeError(f"mlora: {name} and the arena must have one dtype, are {t.dtype} and {arena.dtype}")
    if arena.dtype not in DTYPES or arena.dim() != 1:
        raise RuntimeError(f"mlora: arena must be 1-D of a floating type up to 32 bits, is {arena.dtype}")
    if table.dim() != 2 or table.shape[1] != layout.TABLE_WIDTH or table.dtype is not torch.int64:
        raise RuntimeError(f"mlora: table must be int64 of shape (slots, {layout.TABLE_WIDTH})")
    if plan.dim() != 1 or plan.dtype is not torch.int32 or plan.numel() < layout.PLAN_HEADER:
        raise RuntimeError("mlora: plan must be a 1-D int32 tensor with a header")
    if not table.is_contiguous() or not plan.is_contiguous():
        raise RuntimeError("mlora: table and plan must be contiguous")


def _workspace(x: Tensor) -> tuple[Tensor, int]:
    """The v of `lora`, uninitialized, and its capacity."""
    tokens, width = x.shape
    split = config.form(tokens).split
    capacity = config.capacity(tokens, width, split)
    return x.new_empty((config.slices(width, split), tokens, capacity), dtype=torch.float32), capacity


def shrink_launch(v: Tensor, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor, device: Device) -> Launch:
    tokens, width = x.shape
    f = config.form(tokens)
    constants = {
        "BM": f.shrink_tokens,
        "WIDE": f.wide,
        "BK": config.block_k(x.itemsize),
        "LEAF": config.leaf(width),
        "SPLIT": f.split,
        "GRAIN": f.shrink_grain,
    }
    args = (v, x, arena, table, plan, tokens, width, x.stride(0), v.shape[2])
    grid = config.shrink_grid(device, tokens, width)
    return Launch(lora.shrink, grid, args, constants, f.shrink_warps, config.SHRINK_STAGES, f.shrink_registers)


def apply_launches(
    y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor, device: Device
) -> list[Launch]:
    """The launches of `apply_` on y (tokens, out), base (tokens, out) or None, x (tokens, in)."""
    tokens, width = x.shape
    f = config.form(tokens)
    v, capacity = _workspace(x)
    source = y if base is None else base
    constants = {
        "BM": f.expand_tokens,
        "BN": f.columns,
        "RE": config.RANKS,
        "LEAF": config.leaf(width),
        "SPLIT": f.split,
        "GRAIN": f.expand_grain,
    }
    strides = (x.stride(0), y.stride(0), source.stride(0))
    args = (y, source, v, x, arena, table, plan, tokens, width, y.shape[1], *strides, capacity)
    grid = config.expand_grid(device, tokens, y.shape[1])
    return [
        shrink_launch(v, x, arena, table, plan, device),
        Launch(lora.expand, grid, args, constants, f.expand_warps, 1),
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
    """The launches of `linear` on y (tokens, out), contiguous, and x (tokens, in)."""
    tokens, width = x.shape
    f = config.form(tokens)
    v, capacity = _workspace(x)
    bm, bn, bk, warps, depth = config.linear_tiles(device, tokens, x.itemsize)
    constants = {
        "HAS_BIAS": bias is not None,
        "BM": bm,
        "BN": bn,
        "RE": config.RANKS,
        "BK": bk,
        "LEAF": config.leaf(width),
        "SPLIT": f.split,
    }
    args = (
        y, v, x, weight, weight if bias is None else bias, arena, table, plan, tokens, width, weight.shape[0],
        x.stride(0), weight.stride(0), capacity,
    )  # fmt: skip
    grid = config.linear_grid(device, tokens, weight.shape[0], bm, bn)
    return [
        shrink_launch(v, x, arena, table, plan, device),
        Launch(fused.linear, grid, args, constants, warps, depth),
    ]


def scale_input_launches(
    out: Tensor, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor, device: Device
) -> list[Launch]:
    """The launch of `scale_input` on x (tokens, in) and out, contiguous."""
    tokens, width = x.shape
    bm, bn = 16, 256
    tiles = -(-tokens // bm) * -(-width // bn)
    args = (out, x, arena, table, plan, tokens, width, x.stride(0))
    return [Launch(gains.scale_input, min(device.processors * 4, tiles), args, {"BM": bm, "BN": bn})]


def merge_launches(weight: Tensor, source: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> list[Launch]:
    """The launch of `merge_`: a program for each tile of the weight."""
    width_out, width = weight.shape
    bm, bn = 64, 64 if weight.itemsize == 2 else 32
    args = (weight, source, arena, table, plan, width_out, width, weight.stride(0), source.stride(0))
    grid = -(-width_out // bm) * -(-width // bn)
    return [Launch(merge.merge, grid, args, {"BM": bm, "BN": bn, "RE": config.RANKS}, 8, 2, 128)]


def apply_(y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """`reference.apply_` in two launches; fp32, float16 or bfloat16, one dtype for all."""
    _check(arena, table, plan, x=x, y=y, base=base)
    rows, flat = _flat("y", y), _flat("x", x)
    if rows.shape[0] != flat.shape[0]:
        raise RuntimeError(f"mlora: x has {flat.shape[0]} tokens, y has {rows.shape[0]}")
    if base is not None and base.shape != y.shape:
        raise RuntimeError(f"mlora: base must have y's shape {tuple(y.shape)}, is {tuple(base.shape)}")
    if rows.shape[0] == 0:
        return
    source = None if base is None else _flat("base", base)
    _run(apply_launches(rows, source, flat, arena, table, plan, device_of(y)), y)
    if rows.data_ptr() != y.data_ptr():
        y.copy_(rows.view(y.shape))


def apply_group_(y: list[Tensor], x: Tensor, arena: Tensor, tables: list[Tensor], plan: Tensor) -> None:
    """`reference.apply_group_`, two launches a module."""
    for out, table in zip(y, tables, strict=True):
        apply_(out, None, x, arena, table, plan)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    """`reference.linear` in two launches. The order that a `kblock` asks for is the CPU's, and ignored."""
    if kblock == 0:
        y = F.linear(x, weight, bias)
        apply_(y, None, x, arena, table, plan)
        return y
    _check(arena, table, plan, x=x, weight=weight, bias=bias)
    flat = _flat("x", x)
    if weight.dim() != 2 or weight.shape[1] != flat.shape[1] or weight.stride(1) != 1:
        raise RuntimeError(f"mlora: weight must be (out, {flat.shape[1]}) with unit stride, is {tuple(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        raise RuntimeError(f"mlora: bias must be ({weight.shape[0]},), is {tuple(bias.shape)}")
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if flat.shape[0]:
        rows = y.view(-1, weight.shape[0])
        _run(linear_launches(rows, flat, weight, bias, arena, table, plan, device_of(x)), x)
    return y


def scale_input(x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """`reference.scale_input` in one launch."""
    _check(arena, table, plan, x=x)
    flat = _flat("x", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        _run(scale_input_launches(out.view(flat.shape), flat, arena, table, plan, device_of(x)), x)
    return out


def merge_(weight: Tensor, source: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """`reference.merge_` in one launch."""
    source = weight if source is None else source
    _check(arena, table, plan, weight=weight, source=source)
    if weight.dim() != 2 or weight.stride(1) != 1 or source.shape != weight.shape or source.stride(1) != 1:
        raise RuntimeError(
            f"mlora: weight and source must be 2-D, of one shape, with unit stride within a row, are "
            f"{tuple(weight.shape)} and {tuple(source.shape)}"
        )
    if weight.numel():
        _run(merge_launches(weight, source, arena, table, plan), weight)


def warmup(model: torch.nn.Module, tokens: Sequence[int] = (1, config.DECODE_TOKENS + 1)) -> int:
    """Compile every kernel that a patched model's layers use, before the first request.

    Runs each layer shape once on a plan that routes nothing, in both forms; Triton keeps what it compiled on disk.

    Args:
        tokens: tokens of the forwards to prepare for; one number of each form is enough.

    Returns:
        How many operator calls were made.
    """
    from ..layers import NormLayer

    calls = 0
    seen = set()
    for module in model.modules():
        state = getattr(module, "_mlora", None)
        if state is None or isinstance(module, torch.nn.Embedding):  # those look up: no kernel
            continue
        if isinstance(module, NormLayer) and not state.shared.norms:  # norms, which no adapter trains yet
            continue
        arena = state.shared.arena
        shape = (state.table.shape[0], *_widths(module))
        if arena.device.type not in ("cuda", "cpu") or state.dtype is not arena.dtype or shape in seen:
            continue
        seen.add(shape)
        _, width, width_out = shape
        for count in tokens:
            x, y = (torch.zeros(count, n, dtype=arena.dtype, device=arena.device) for n in (width, width_out))
            apply_(y, None, x, arena, state.table, state.shared.blank)
            scale_input(x, arena, state.table, state.shared.blank)
            calls += 2
    return calls


def _widths(module: Any) -> tuple[int, int]:
    """(in, out) of a linear, a Conv1D, a convolution or a norm."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "kernel_size"):
        return module.in_channels * math.prod(module.kernel_size), module.out_channels
    return module.weight.shape[0], module.weight.shape[-1]
