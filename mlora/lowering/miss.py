"""MiSS: dW[:, i] = M[i mod r]   (Kang & Yin, arXiv:2409.15371), M = `miss_block`, (r, out).

A sums the inputs whose index is j modulo r, so it is of zeros and ones. `mini` repeats a narrower M along
the outputs. `bat` (an r x r block M_o for each r outputs) adds W_oi M_o + M_o to every r x r block W_oi of W. Since M_o
goes with the output's block and yet stands where the input comes in, it turns neither inputs nor outputs: each block of
outputs would read an input of its own. So the change itself is stored, at the price of a copy of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Delta, compact, whole
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={"miss_block": "miss_block"},
    honoured={"r", "init_weights", "mini_r"},
    neutral={"miss_dropout"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, rank, form = module.base, module.integer("r", 64), module.config.get("init_weights", True)
    if form == "bat":
        module.divides("r", rank, base.in_features, base.out_features)
        blocks = module.part("miss_block", base.out_features // rank, rank, rank)
        return whole(lambda: _bat(base.weight(), blocks), base.out_features, base.in_features)
    if form == "mini":
        width = module.integer("mini_r", 1)
        module.divides("mini_r", width, base.out_features)
        b = module.part("miss_block", rank, width).repeat(1, base.out_features // width)
    else:
        b = module.part("miss_block", rank, base.out_features)
    a = (torch.arange(base.in_features) % rank == torch.arange(rank)[:, None]).float()
    return compact(a, b)


def _bat(weight: Tensor, blocks: Tensor) -> Tensor:
    """(out, in): each r x r block W_oi of W becomes W_oi M_o + M_o."""
    (outputs, inputs), rank = weight.shape, blocks.shape[-1]
    tiles = weight.double().reshape(outputs // rank, rank, inputs // rank, rank)
    wide = blocks.double()
    return (torch.einsum("oaib,obc->oaic", tiles, wide) + wide[:, :, None]).reshape(outputs, inputs)


MISS = Lowering(FORMAT, delta)
