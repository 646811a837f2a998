"""Heads of another size than the model's: rows of one batch with outputs of several widths."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Head(NamedTuple):
    """Where a resident adapter keeps its own head, in elements of the arena: `weight` (width, in) and `bias` (width,),
    -1 if it has none."""

    weight: int
    bias: int
    width: int


def answer(
    x: Tensor, heads: tuple[Head | None, ...], arena: Tensor, base: Callable[[Tensor], Tensor], out_features: int
) -> Tensor:
    """What each row's head makes of x, (..., in): (..., widest), the rows of narrower heads filled up with -inf, which
    is a probability of 0. Where all heads have one width, that is the width.

    Args:
        heads: of each of the plan's rows, each as many of x's rows as the others; None is the model's own.
        base: the model's own, on all of x; not called where every row has another.
    """
    widths = [out_features if head is None else head.width for head in heads]
    rows = x.reshape(len(heads), -1, x.shape[-1])
    out = x.new_full((*rows.shape[:2], max(widths)), -math.inf)
    if None in heads:
        mine = torch.tensor([row for row, head in enumerate(heads) if head is None], device=x.device)
        out[mine, :, :out_features] = base(x).reshape(len(heads), -1, out_features)[mine]
    for head in dict.fromkeys(heads):
        if head is not None:
            weight = arena[head.weight : head.weight + head.width * x.shape[-1]].view(head.width, -1).to(x.dtype)
            bias = None if head.bias < 0 else arena[head.bias : head.bias + head.width].to(x.dtype)
            mine = torch.tensor([row for row, own in enumerate(heads) if own == head], device=x.device)
            out[mine, :, : head.width] = F.linear(rows[mine], weight, bias)
    return out.view(*x.shape[:-1], -1)
