"""The operators in plain torch: the semantics, the oracle of the kernels, and the path for training.

Everything is computed in fp32 (fp64 for fp64 inputs) and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout


class Term(NamedTuple):
    """One weighted slot of a recipe: a row of the table."""

    slot: int
    weight: float
    rank: int
    scale: float
    a: int
    b: int
    gain: int
    in_gain: int
    shift: int
    whole: bool
    turn: int
    turn_shape: int
    in_turn: int
    in_turn_shape: int


class Route(NamedTuple):
    tokens: Tensor  # int64, the tokens that take this recipe
    terms: list[Term]


def _float(bits: int) -> float:
    return float(np.uint32(bits & 0xFFFFFFFF).view(np.float32))


def _starts(name: str, starts: list[int], limit: int) -> list[int]:
    if starts[0] != 0 or sorted(starts) != starts or starts[-1] > limit:
        raise RuntimeError(f"mlora: plan's {name} must rise from 0 to at most {limit}, is {starts}")
    return starts


def routes(plan: Tensor, table: Tensor, tokens: int) -> list[Route]:
    """Read a plan and the table rows it names.

    Raises RuntimeError if the plan does not fit its own size, the tokens or the table.
    """
    if plan.dim() != 1 or plan.dtype != torch.int32 or plan.numel() < layout.PLAN_HEADER:
        raise RuntimeError("mlora: plan must be a 1-D int32 tensor with a header")
    if table.dim() != 2 or table.shape[1] != layout.TABLE_WIDTH or table.dtype != torch.int64:
        raise RuntimeError(f"mlora: table must be int64 of shape (slots, {layout.TABLE_WIDTH})")
    host = plan.cpu()
    entries = host.tolist()
    rows, count, terms = entries[:3]
    if min(rows, count, terms) < 0 or (rows == 0 and count):
        raise RuntimeError(f"mlora: plan header has rows {rows}, routes {count}, terms {terms}")
    if rows == 0 or count == 0:
        return []
    lengths = (count + 1, rows, count + 1, terms, terms)
    if layout.PLAN_HEADER + sum(lengths) > len(entries):
        needed = layout.PLAN_HEADER + sum(lengths)
        raise RuntimeError(f"mlora: plan of {rows} rows needs {needed} entries, it has {len(entries)}")
    if tokens % rows:
        raise RuntimeError(f"mlora: {tokens} tokens do not divide into the plan's {rows} rows")
    parts, at = [], layout.PLAN_HEADER
    for length in lengths:
        parts.append(entries[at : at + length])
        at += length
    row_start, row_order, term_start, term_slot, term_weight = parts
    _starts("row_start", row_start, rows)
    _starts("term_start", term_start, terms)
    for row in row_order[: row_start[-1]]:
        if not 0 <= row < rows:
            raise RuntimeError(f"mlora: plan names row {row} of {rows}")
    for slot in term_slot:
        if not 0 <= slot < table.shape[0]:
            raise RuntimeError(f"mlora: plan names slot {slot}, the table has {table.shape[0]}")

    named = dict(zip(term_slot, table[term_slot].tolist(), strict=True)) if term_slot else {}
    length = tokens // rows
    within = torch.arange(length)
    result = []
    for p in range(count):
        recipe = []
        for e in range(term_start[p], term_start[p + 1]):
            row = named[term_slot[e]]
            term = Term(
                slot=term_slot[e],
                weight=_float(term_weight[e]),
                rank=row[layout.RANK],
                scale=_float(row[layout.SCALE]),
                a=row[layout.A],
                b=row[layout.B],
                gain=row[layout.GAIN],
                in_gain=row[layout.IN_GAIN],
                shift=row[layout.SHIFT],
                whole=row[layout.WHOLE] == 1,
                turn=row[layout.TURN],
                turn_shape=row[layout.TURN_SHAPE],
                in_turn=row[layout.IN_TURN],
                in_turn_shape=row[layout.IN_TURN_SHAPE],
            )
            if term.rank < 0 or (term.rank and max(term.a, term.b) < 0):
                raise RuntimeError(f"mlora: slot {term.slot} has rank {term.rank} but no A or B")
            recipe.append(term)
        order = torch.tensor(row_order[row_start[p] : row_start[p + 1]], dtype=torch.int64)
        index = (order[:, None] * length + within).flatten()
        result.append(Route(index.to(plan.device), recipe))
    return result


def part_at(arena: Tensor, offset: int, count: int, slot: int, dtype: torch.dtype) -> Tensor:
    if offset < 0 or offset + count > arena.numel():
        raise RuntimeError(
            f"mlora: slot {slot}: elements {offset} to {offset + count} are outside of the arena of {arena.numel()}"
        )
    # Autograd keeps what it was given, and by the time of the backward pass another adapter may lie there.
    return arena[offset : offset + count].to(dtype, copy=torch.is_grad_enabled())


def factor(arena: Tensor, offset: int, t: Term, width: int, dtype: torch.dtype) -> Tensor | None:
    """A or B of a term, (rank, width); None where it is the identity."""
    if offset >= 0:
        return part_at(arena, offset, t.rank * width, t.slot, dtype).view(t.rank, width)
    if t.rank != width:
        raise RuntimeError(
            f"mlora: slot {t.slot} has rank {t.rank} but no A or B, and no identity of {width} in its place"
        )
    return None


def turned(x: Tensor, turn: Tensor, stride: int, transposed: bool = False) -> Tensor:
    """(T - I) x along the last dimension, or (T - I)^T x. Shapes: x (..., width), turn (size, width) as in `layout`."""
    blocks = turn.reshape(len(turn), -1, len(turn), stride)  # [j, span, k, lane]
    if transposed:
        blocks = blocks.transpose(0, 2)
    return torch.einsum("jskl,...sjl->...skl", blocks, x.unflatten(-1, blocks.shape[1:])).flatten(-3)


def _turned(x: Tensor, arena: Tensor, offset: int, shape: int, t: Term, transposed: bool = False) -> Tensor:
    """`turned` by a term's turn at `offset`."""
    size, stride = layout.size_and_stride(shape)
    width = x.shape[-1]
    if min(size, stride) < 1 or width % (size * stride):
        raise RuntimeError(f"mlora: slot {t.slot} turns blocks of {size} elements, {stride} apart, of {width}")
    return turned(x, part_at(arena, offset, size * width, t.slot, x.dtype).view(size, width), stride, transposed)


def added(
    x: Tensor, y: Tensor, base: Tensor, arena: Tensor, table: Tensor, plan: Tensor, keep: Iterator[Tensor] | None = None
) -> Tensor:
    """y + gain * base + B^T (A x) + shift in y's dtype, which is that of the computation; all (tokens, ...). `keep`:
    where each term's v goes, (tokens, rank)."""
    dtype, width_in, width_out = y.dtype, x.shape[1], y.shape[1]
    for route in routes(plan, table, x.shape[0]):
        delta, gain = None, None
        for t in route.terms:
            if t.rank:
                a, b = factor(arena, t.a, t, width_in, dtype), factor(arena, t.b, t, width_out, dtype)
                own = x[route.tokens].to(dtype)
                v = (own if a is None else own @ a.T) * (t.weight * t.scale)
                if keep is not None:
                    next(keep).copy_(v)
                out = v if b is None else v @ b
                delta = out if delta is None else delta + out
            if t.shift >= 0:
                shift = t.weight * part_at(arena, t.shift, width_out, t.slot, dtype)
                delta = shift if delta is None else delta + shift
            if t.gain >= 0:
                g = t.weight * part_at(arena, t.gain, width_out, t.slot, dtype)
                gain = g if gain is None else gain + g
        if gain is not None:
            scaled = gain * base[route.tokens].to(dtype)
            delta = scaled if delta is None else delta + scaled
        if delta is not None:
            y = y.index_copy(0, route.tokens, y[route.tokens] + delta)
    return y


def tokens_of(name: str, t: Tensor) -> Tensor:
    if t.dim() < 1 or t.shape[-1] == 0:
        raise RuntimeError(f"mlora: {name} must have a last dimension, is {tuple(t.shape)}")
    return t.reshape(-1, t.shape[-1])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def apply(y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """What `apply_` leaves in y, as a new tensor; differentiable with respect to y, base and x.

    Semantics: y + (sum_i w_i gain_i) * b + sum_i w_i scale_i B_i^T (A_i x) + sum_i w_i shift_i over the terms i
    of each row's recipe, where b is `base`, or y if that is None.
    Shapes: x (..., in), y and base (..., out), arena (elements,), table and plan as in `layout`.
    """
    rows, x_rows = tokens_of("y", y), tokens_of("x", x)
    if rows.shape[0] != x_rows.shape[0]:
        raise RuntimeError(f"mlora: x has {x_rows.shape[0]} tokens, y has {rows.shape[0]}")
    if base is not None and base.shape != y.shape:
        raise RuntimeError(f"mlora: base must have y's shape {tuple(y.shape)}, is {tuple(base.shape)}")
    before = rows.to(wide(y.dtype))
    b = before if base is None else tokens_of("base", base)
    return added(x_rows, before, b, arena, table, plan).to(y.dtype).view(y.shape)


def embed(y: Tensor, ids: Tensor, arena: Tensor, table: Tensor, plan: Tensor, vocab: int) -> Tensor:
    """What `embed_` leaves in y, as a new tensor; differentiable with respect to y.

    Semantics: y + (sum_i w_i gain_i) * y + sum_i w_i scale_i B_i^T A_i[:, ids] over the terms i of each row's recipe,
    which is `apply` on one-hot inputs. Summed rank row by rank row, so that no token's bits depend on how many others
    there are; rank rows that are 0 for all tokens (trained tokens that do not occur) and an identity B are skipped.
    Shapes: y (..., out), ids (...) in [0, vocab), arena (elements,), table and plan as in `layout`, A (rank, vocab).
    """
    rows, flat = tokens_of("y", y), ids.reshape(-1)
    if rows.shape[0] != flat.numel():
        raise RuntimeError(f"mlora: ids has {flat.numel()} tokens, y has {rows.shape[0]}")
    out, width = rows.to(wide(y.dtype)), rows.shape[1]
    for route in routes(plan, table, flat.numel()):
        delta = None
        for t in route.terms:
            if t.gain >= 0:
                added = t.weight * part_at(arena, t.gain, width, t.slot, out.dtype) * out[route.tokens]
                delta = added if delta is None else delta + added
            if not t.rank:
                continue
            a = part_at(arena, t.a, t.rank * vocab, t.slot, arena.dtype).view(t.rank, vocab)
            v = a[:, flat[route.tokens]].to(out.dtype) * (t.weight * t.scale)
            if t.whole:
                delta = v.t() if delta is None else delta + v.t()
                continue
            b = part_at(arena, t.b, t.rank * width, t.slot, out.dtype).view(t.rank, width)
            for j in v.any(dim=1).nonzero().flatten().tolist():
                added = v[j][:, None] * b[j]
                delta = added if delta is None else delta + added
        if delta is not None:
            out = out.index_copy(0, route.tokens, out[route.tokens] + delta)
    return out.to(y.dtype).view(y.shape)


def embed_(y: Tensor, ids: Tensor, arena: Tensor, table: Tensor, plan: Tensor, vocab: int) -> None:
    """y <- embed(y, ...), in place. Rows without a route keep their bits."""
    y.copy_(embed(y, ids, arena, table, plan, vocab))


def apply_(y: Tensor, base: Tensor | None, x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """y <- apply(y, ...), in place. Rows without a route keep their bits."""
    y.copy_(apply(y, base, x, arena, table, plan))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor, kblock: int
) -> Tensor:
    """x weight^T + bias, then `apply` on the unrounded sum; one rounding.

    Shapes: x (..., in), weight (out, in), bias (out,). `kblock` orders the sum over `in`. Where it is 0 the library
    computes the product and rounds it before the delta is added, so that rows without a route have the library's bits.
    """
    if kblock == 0:
        return apply(F.linear(x, weight, bias), None, x, arena, table, plan)
    rows = tokens_of("x", x)
    dtype = wide(x.dtype)
    product = F.linear(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    out = added(rows, product, product, arena, table, plan)
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def scale_input(x: Tensor, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """x * (1 + sum_i w_i in_gain_i) + sum_i w_i (in-turn_i - I) x over the terms of each row's recipe, rounded once;
    differentiable.

    Shapes: x (..., in), arena (elements,), table and plan as in `layout`.
    """
    rows = tokens_of("x", x)
    out = rows.to(wide(x.dtype))
    for route in routes(plan, table, rows.shape[0]):
        gains = [
            t.weight * part_at(arena, t.in_gain, rows.shape[1], t.slot, out.dtype)
            for t in route.terms
            if t.in_gain >= 0
        ]
        turns = [t for t in route.terms if t.in_turn >= 0]
        if not gains and not turns:
            continue
        old = rows[route.tokens].to(out.dtype)
        new = old * (1 + torch.stack(gains).sum(0)) if gains else old
        for t in turns:
            new = new + t.weight * _turned(old, arena, t.in_turn, t.in_turn_shape, t)
        out = out.index_copy(0, route.tokens, new)
    out = out.to(x.dtype).view(x.shape)
    return out.clone() if out.data_ptr() == x.data_ptr() else out


def turn_output(y: Tensor, base: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> Tensor:
    """y + sum_i w_i (turn_i - I) b over the terms of each row's recipe, rounded once, where b is `base`, or y if that
    is None; differentiable with respect to both.

    Shapes: y and base (..., out), arena (elements,), table and plan as in `layout`.
    """
    rows = tokens_of("y", y)
    if base is not None and base.shape != y.shape:
        raise RuntimeError(f"mlora: base must have y's shape {tuple(y.shape)}, is {tuple(base.shape)}")
    b = rows if base is None else tokens_of("base", base)
    out = rows.to(wide(y.dtype))
    for route in routes(plan, table, rows.shape[0]):
        old = None
        for t in route.terms:
            if t.turn >= 0:
                old = b[route.tokens].to(out.dtype) if old is None else old
                added = t.weight * _turned(old, arena, t.turn, t.turn_shape, t)
                out = out.index_copy(0, route.tokens, out[route.tokens] + added)
    out = out.to(y.dtype).view(y.shape)
    return out.clone() if out.data_ptr() == y.data_ptr() else out


def apply_group_(y: list[Tensor], x: Tensor, arena: Tensor, tables: list[Tensor], plan: Tensor) -> None:
    """`apply_` for modules that read the same x: y[i] <- apply(y[i], None, x, arena, tables[i], plan)."""
    for out, table in zip(y, tables, strict=True):
        apply_(out, None, x, arena, table, plan)


def merge_(weight: Tensor, source: Tensor | None, arena: Tensor, table: Tensor, plan: Tensor) -> None:
    """Fold the recipe of the plan's one row into the weight of a linear, in place, with one rounding.

    Semantics: W <- S * (1 + sum_i w_i (gain_i[:, None] + in_gain_i[None, :])) + sum_i w_i scale_i B_i^T A_i, where S is
    `source`, or W if that is None: base(x) becomes what the layer makes of it, apart from the bias. With turns, also
    + sum_i w_i ((turn_i - I) S + S (in-turn_i - I)), which is the reference's alone: kernels read W tile by tile.
    Shapes: weight and source (out, in), contiguous; table as in `layout`; plan of one row, without spare capacity.
    """
    dtype = wide(weight.dtype)
    height, width = weight.shape
    base = (weight if source is None else source).to(dtype)
    out = base.clone()
    for route in routes(plan, table, 1):
        for t in route.terms:
            if t.rank:
                a, b = factor(arena, t.a, t, width, dtype), factor(arena, t.b, t, height, dtype)
                product = a if b is None else b.T if a is None else b.T @ a
                assert product is not None
                out += (t.weight * t.scale) * product
            if t.gain >= 0:
                out += t.weight * part_at(arena, t.gain, height, t.slot, dtype)[:, None] * base
            if t.in_gain >= 0:
                out += t.weight * part_at(arena, t.in_gain, width, t.slot, dtype) * base
            if t.turn >= 0:
                out += t.weight * _turned(base.t(), arena, t.turn, t.turn_shape, t).t()
            if t.in_turn >= 0:
                out += t.weight * _turned(base, arena, t.in_turn, t.in_turn_shape, t, transposed=True)
    weight.copy_(out)
