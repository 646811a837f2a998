"""HRA: W' = W H_1 ... H_r, H_i = I - 2 u_i u_i^T / |u_i|^2   (Yuan et al., arXiv:2405.17484).

The product of r reflections differs from I by a matrix of rank r, so given W the delta is a LoRA:
W (H_1 ... H_r - I) = -2 sum_i W (H_1 ... H_{i-1} u_i) u_i^T. With `apply_GS` the u are first made
orthonormal (Gram-Schmidt) and the product is I - 2 sum_i u_i u_i^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(parts={"hra_u": "hra_u"}, honoured={"r", "apply_GS"}, neutral={"init_weights"}, convs={2})


def delta(module: Module) -> Delta:
    """The delta of one module."""
    module.plain_conv()
    base, rank = module.base, module.integer("r", 8)
    vectors = module.part("hra_u", base.in_features, rank).double()
    orthogonal = bool(module.config.get("apply_GS"))
    u: list[Tensor] = []
    left: list[Tensor] = []  # H_1 ... H_{i-1} u_i
    for i in range(rank):
        vector = vectors[:, i]
        if orthogonal:
            for other in u:
                vector = vector - (other @ vector) * other
        norm = vector.norm()
        if not norm > 0:
            raise errors.AdapterError(f"{module.where}: hra_u has a zero vector (number {i}), which reflects nothing")
        vector = vector / norm
        rotated = vector
        if not orthogonal:
            for other, before in zip(u, left, strict=True):
                rotated = rotated - 2 * (other @ vector) * before
        u.append(vector)
        left.append(rotated)
    b = -2 * torch.stack(left) @ base.weight().double().t()
    return compact(torch.stack(u).float(), b.float())


HRA = Lowering(FORMAT, delta)
