"""BOFT: W' = diag(s) W R^T, R a product of butterfly rotations   (Liu et al., arXiv:2311.06243).

R = P_m D_m P_m^T ... P_1 D_1 P_1^T: each D is block-diagonal, its blocks the Cayley transforms of skew-symmetric
matrices, and each P a permutation that brings halves of neighbouring blocks together. With one factor, which is all
that PEFT trains without its CUDA extension, there is no P. W R^T has full rank; s is a gain. Unlike OFT's, R is no turn
of the input beside it: s multiplies what W makes of the turned input, and deltas add without a cross term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Dense
from .module import Format, Lowering, Module


def delta(module: Module) -> Dense:
    """The delta of one module."""
    module.plain_conv()
    base = module.base
    blocks, size = (module.integer(option, 0, least=0) for option in ("boft_block_num", "boft_block_size"))
    factors = module.integer("boft_n_butterfly_factor", 1)
    if bool(blocks) == bool(size):
        raise errors.AdapterError(
            f"{module.where}: boft_block_num is {blocks} and boft_block_size {size}; one of them must be 0"
        )
    module.divides("boft_block_num" if blocks else "boft_block_size", blocks or size, base.in_features)
    blocks, size = blocks or base.in_features // size, size or base.in_features // blocks
    if factors > 1 and (size % 2 or factors > blocks or blocks % 2 ** (factors - 1)):
        raise errors.AdapterError(
            f"{module.where}: boft_n_butterfly_factor is {factors}, which does not go with {blocks} blocks of {size}"
        )
    packed = module.part("boft_R", factors, blocks, size, size).double()
    scale = module.part("boft_s", *((1, base.out_features) if base.conv else (base.out_features, 1))).flatten()

    def weight() -> Tensor:
        w = base.weight().double()
        return (w @ _rotation(packed).t() - w) * scale.double()[:, None]

    bias = base.bias()
    return Dense(
        weight,
        "it rotates the input of the base weight and scales what comes of it",
        gain=scale - 1,
        shift=None if bias is None else (1 - scale) * bias,
    )


def _rotation(packed: Tensor) -> Tensor:
    """R, (in, in), of blocks (factors, blocks, size, size)."""
    factors, blocks, size, _ = packed.shape
    skew = (packed - packed.transpose(-1, -2)) / 2
    eye = torch.eye(size, dtype=packed.dtype)
    turns = torch.linalg.solve(eye + skew, eye - skew, left=False)
    if factors == 1:
        return torch.block_diag(*turns[0])
    rotation = torch.eye(blocks * size, dtype=packed.dtype)
    for step, turn in enumerate(turns):
        order = _order(blocks * size, 2**step * size, size // 2)
        # P has its ones at (i, order[i]), so P D P^T is D with its rows and columns in that order.
        rotation = torch.block_diag(*turn)[order][:, order] @ rotation
    return rotation


def _order(inputs: int, span: int, half: int) -> Tensor:
    """Within each `span` of inputs, the pieces of length `half` with an even number before those with an odd one."""
    pieces = torch.arange(inputs).reshape(-1, span // half, half)
    return torch.cat((pieces[:, 0::2], pieces[:, 1::2]), dim=1).flatten()


BOFT = Lowering(
    Format(
        parts={"boft_R": "boft_R", "boft_s": "boft_s"},
        honoured={"boft_block_size", "boft_block_num", "boft_n_butterfly_factor"},
        neutral={"boft_dropout", "init_weights"},
        convs={2},
    ),
    delta,
)
