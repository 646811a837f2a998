"""Heads and token embeddings of another size than the model's: rows of one batch with several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import errors
from ..plan.plan import to_device


class Head(NamedTuple):
    """Where a resident adapter keeps its own head, in elements of the arena: `weight` (width, in) and `bias` (width,),
    -1 if it has none. Of an embedding `width` is the number of tokens, and `in` what it gives."""

    weight: int
    bias: int
    width: int


class Heads(NamedTuple):
    """Of a module in a plan: `rows` of the plan, and which of them each head answers, as indices on the device; the
    model's own head is None. `widths` is that of each row's, int64 (rows, 1), on the host; `last` is one less, on the
    device."""

    rows: int
    answered: tuple[tuple[Head | None, Tensor], ...]
    widths: Tensor
    last: Tensor


def group_heads(heads: Sequence[Head | None], width: int, device: torch.device) -> Heads:
    """By head: `heads` has one for each of the plan's rows; `width` is that of the model's own. One copy to the device,
    so that layers need none."""
    rows = {own: [row for row, head in enumerate(heads) if head == own] for own in heads}
    widths = np.array([width if head is None else head.width for head in heads], dtype=np.int64)
    order, last = to_device(np.stack([np.concatenate([*rows.values()]), widths - 1]), device)
    answered = zip(rows, order.split([len(mine) for mine in rows.values()]), strict=True)
    return Heads(len(heads), tuple(answered), torch.from_numpy(widths)[:, None], last[:, None])


def answer(x: Tensor, heads: Heads, arena: Tensor, base: Callable[[Tensor], Tensor], out_features: int) -> Tensor:
    """What each row's head makes of x, (..., in): (..., widest), the rows of narrower heads filled up with -inf, which
    is a probability of 0. Where all heads have one width, that is the width.

    Args:
        heads: each of the plan's rows is as many of x's rows as the others.
        base: the model's own, on all of x; not called where every row has another.
    """
    rows = x.reshape(heads.rows, -1, x.shape[-1])
    widest = max(out_features if head is None else head.width for head, _ in heads.answered)
    out = x.new_full((*rows.shape[:2], widest), -math.inf)
    for head, mine in heads.answered:
        if head is None:
            out[mine, :, :out_features] = base(x).reshape(heads.rows, -1, out_features)[mine]
        else:
            weight = arena[head.weight : head.weight + head.width * x.shape[-1]].view(head.width, -1).to(x.dtype)
            bias = None if head.bias < 0 else arena[head.bias : head.bias + head.width].to(x.dtype)
            out[mine, :, : head.width] = F.linear(rows[mine], weight, bias)
    return out.view(*x.shape[:-1], -1)


def look_up(
    ids: Tensor,
    heads: Heads,
    arena: Tensor,
    base: Callable[[Tensor], Tensor],
    under: Callable[[Tensor, Tensor], Tensor],
    features: int,
) -> Tensor:
    """What each row's embedding has for its ids, all of which it has (`check_tokens`, `within`).

    Args:
        heads: each of the plan's rows is as many of the rows of `ids` as the others; None is the model's own.
        base: the model's own, with what adapters add to it, on all rows; those that have another are given id 0.
            Not called where every row has another.
        under: the embedding under another weight, (tokens, features).
    """
    rows, parts = ids.reshape(heads.rows, -1), []
    for head, mine in heads.answered:
        own = rows[mine]
        if head is None:
            known = torch.zeros_like(rows).index_copy(0, mine, own)
            found = base(known.view(ids.shape)).reshape(*rows.shape, -1)[mine]
        else:
            found = under(arena[head.weight :][: head.width * features].view(head.width, features), own)
        parts.append((mine, found))
    out = parts[0][1].new_empty(*rows.shape, features)
    for mine, found in parts:
        out = out.index_copy(0, mine, found)
    return out.view(*ids.shape, features)


def check_tokens(ids: Tensor, heads: Heads, tokens: int, name: str) -> None:
    """Raise `TokenError` if there is an id, on the host, that its row's embedding does not have. `tokens` are those of
    the model's own; `name` is the module's."""
    rows = ids.reshape(heads.rows, -1)
    if (beyond := (rows < 0) | (rows >= heads.widths)).any():
        planned, column = beyond.nonzero()[0].tolist()
        width = int(heads.widths[planned])
        row = (planned * rows.shape[1] + column) * len(ids) // ids.numel()  # of the batch
        raise errors.TokenError(
            f"row {row} has token {int(rows[planned, column])}; {name} has {width} tokens "
            f"{'in the model' if width == tokens else 'in the adapter of that row'}"
        )


def within(ids: Tensor, heads: Heads) -> Tensor:
    """The nearest ids that each row's embedding has, without a look at them from the host."""
    return ids.reshape(heads.rows, -1).clamp(min=0).minimum(heads.last).view(ids.shape)
