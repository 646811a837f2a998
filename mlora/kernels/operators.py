"""The operators on tensors that the kernels can read. They check shapes and dtypes, and run what `launch.py` says.

Nothing here reads the contents of a tensor, so nothing waits for the device. The plan and the table are trusted: what
`reference.routes` refuses is undefined here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout
from . import arrivals, work
from .launch import (
    Launch,
    apply_launches,
    device_of,
    drop_launches,
    embed_launches,
    gradient_launches,
    linear_launches,
    merge_launches,
    turn_launches,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def apply_(y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """`reference.apply_` in two launches; fp32, float16 or bfloat16, one dtype for all, or an arena of fp32 beside 16
    bits."""
    _apply(y, None, base, x, arena, table, plan)


def apply_keep_(
    y: Tensor, v: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    """`training.apply_keep_` in the launches of `apply_`."""
    _check_kept(v)
    _apply(y, v, base, x, arena, table, plan)


def _apply(
    y: Tensor, v: Tensor | None, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    _check(arena, table, plan, x=x, y=y, base=base)
    rows, flat = _flat("y", y), _flat("x", x)
    if rows.shape[0] != flat.shape[0]:
        raise RuntimeError(f"mlora: x has {flat.shape[0]} tokens, y has {rows.shape[0]}")
    if base is not None and base.shape != y.shape:
        raise RuntimeError(f"mlora: base must have y's shape {tuple(y.shape)}, is {tuple(base.shape)}")
    if rows.shape[0] == 0:
        return
    source = None if base is None else _flat("base", base)
    arrived = arrivals.counters(y.device, rows.shape[0])
    _run(apply_launches(rows, source, flat, arena, table, plan, arrived, device_of(y), v), y)
    if rows.data_ptr() != y.data_ptr():
        y.copy_(rows.view(y.shape))


def apply_group_(y: list[Tensor], x: Tensor, arena: Tensor, tables: list[Tensor], plan: Tensor) -> None:
    """`reference.apply_group_`, two launches a module."""
    for out, table in zip(y, tables, strict=True):
        apply_(out, None, x, arena, table, plan)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    """`reference.linear` in one launch. The order that a `kblock` asks for is the CPU's, and ignored."""
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


def linear_keep(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    arena: Tensor,
    table: Tensor,
    plan: Tensor,
    kblock: int,
) -> Tensor:
    """`training.linear_keep`: `linear`, and unless kblock is 0 a `shrink` of its own for v."""
    _check_kept(v)
    if kblock == 0:
        y = F.linear(x, weight, bias)
        apply_keep_(y, v, None, x, arena, table, plan)
        return y
    y = linear(x, weight, bias, arena, table, plan, kblock)
    flat = _flat("x", x)
    if flat.shape[0]:
        rows, arrived = y.view(-1, weight.shape[0]), arrivals.counters(x.device, flat.shape[0])
        _run(apply_launches(rows, None, flat, arena, table, plan, arrived, device_of(x), v)[:1], x)
    return y


def rank_gradients_(
    to: Tensor, v: Tensor, rows: Tensor, offsets: Tensor, arena: Tensor, table: Tensor, plan: Tensor
) -> None:
    """`training.rank_gradients_` in one launch."""
    _check(arena, table, plan, rows=rows)
    _check_kept(v)
    if to.dim() != 1 or not to.is_contiguous() or to.dtype is not torch.float32:
        raise RuntimeError(f"mlora: to must be a contiguous 1-D float32 tensor, is {to.dtype}, {tuple(to.shape)}")
    if offsets.shape != table.shape[:1] or offsets.dtype is not torch.int64 or not offsets.is_contiguous():
        raise RuntimeError(f"mlora: offsets must be int64 of {len(table)} slots, is {tuple(offsets.shape)}")
    flat = _flat("rows", rows)
    if flat.shape[0]:
        _run(gradient_launches(to, v, flat, offsets, table, plan, device_of(rows)), rows)


def _check_kept(v: Tensor) -> None:
    if v.dim() != 1 or not v.is_contiguous() or v.dtype is not torch.float32:
        raise RuntimeError(f"mlora: v must be a contiguous 1-D float32 tensor, is {v.dtype}, {tuple(v.shape)}")


def drop(x: Tensor, places: Tensor, odds: Tensor) -> Tensor:
    """`ops.dropout.drop` in one launch; places that name an adapter beyond odds are undefined."""
    for name, t, width in (("places", places, 4), ("odds", odds, 3)):
        if t.dim() != 2 or t.shape[1] != width or t.dtype is not torch.int32 or not t.is_contiguous():
            raise RuntimeError(f"mlora: {name} must be a contiguous int32 tensor of (n, {width}), is {tuple(t.shape)}")
    flat, rows = _flat("x", x), len(places)
    if flat.shape[0] % rows if rows else flat.shape[0]:
        raise RuntimeError(f"mlora: {flat.shape[0]} tokens do not divide into {rows} places")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        _run(drop_launches(out.view(flat.shape), flat, places, odds), x)
    return out


def scale_input(x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """`reference.scale_input` in one launch."""
    _check(arena, table, plan, x=x)
    flat = _flat("x", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        _run(turn_launches(out.view(flat.shape), flat, None, arena, table, plan, device_of(x)), x)
    return out


def turn_output(y: Tensor, base: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """`reference.turn_output` in one launch."""
    _check(arena, table, plan, y=y, base=base)
    if base is not None and base.shape != y.shape:
        raise RuntimeError(f"mlora: base must have y's shape {tuple(y.shape)}, is {tuple(base.shape)}")
    rows = _flat("y", y)
    turned = rows if base is None else _flat("base", base)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if rows.shape[0]:
        _run(turn_launches(out.view(rows.shape), turned, rows, arena, table, plan, device_of(y)), y)
    return out


def embed_(y: Tensor, ids: Tensor, arena: Tensor, table: Tensor, plan: Tensor, vocab: int) -> None:
    """`reference.embed_` in one launch; ids that are not in [0, vocab) are undefined."""
    _check(arena, table, plan, y=y)
    rows, picked = _flat("y", y), ids.reshape(-1)
    if rows.shape[0] != picked.shape[0]:
        raise RuntimeError(f"mlora: ids has {picked.shape[0]} tokens, y has {rows.shape[0]}")
    if picked.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"mlora: ids must be int32 or int64, are {picked.dtype}")
    if rows.shape[0] == 0:
        return
    _run(embed_launches(rows, picked.contiguous(), arena, table, plan, vocab, device_of(y)), y)
    if rows.data_ptr() != y.data_ptr():
        y.copy_(rows.view(y.shape))


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
    found = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(found.values())) > 1:
        raise RuntimeError(
            f"mlora: {' and '.join(found)} must have one dtype, are {', '.join(map(str, found.values()))}"
        )
    for name, dtype in found.items():
        if dtype is not arena.dtype and (arena.dtype is not torch.float32 or dtype not in DTYPES):
            raise RuntimeError(
                f"mlora: {name} and the arena must have one dtype, or the arena float32 beside 16 bits, are {dtype} "
                f"and {arena.dtype}"
            )
    if arena.dtype not in DTYPES or arena.dim() != 1:
        raise RuntimeError(f"mlora: arena must be 1-D of a floating type up to 32 bits, is {arena.dtype}")
    if table.dim() != 2 or table.shape[1] != layout.TABLE_WIDTH or table.dtype is not torch.int64:
        raise RuntimeError(f"mlora: table must be int64 of shape (slots, {layout.TABLE_WIDTH})")
    if plan.dim() != 1 or plan.dtype is not torch.int32 or plan.numel() < layout.PLAN_HEADER:
        raise RuntimeError("mlora: plan must be a 1-D int32 tensor with a header")
    if not table.is_contiguous() or not plan.is_contiguous():
        raise RuntimeError("mlora: table and plan must be contiguous")
