"""OFT: W' = W R^T, R block-diagonal and orthogonal   (Qiu et al., arXiv:2306.07280).

The blocks turn the input before W reads it. With `coft` each block's skew-symmetric Q is first shortened to a Frobenius
norm of eps / sqrt(b) at most, b the number of blocks in the file, whenever the adapter runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import errors
from .delta import Delta
from .module import Format, Lowering, Module
from .turn import Turn


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, size, r = module.base, module.integer("oft_block_size", 32, least=0), module.integer("r", 0, least=0)
    if base.conv is not None and (math.prod(base.kernel) > 1 or not base.conv.zero_padded):
        raise errors.UnsupportedAdapterError(
            f"{module.where}: OFT is served on 1x1 convolutions padded with zeros only; of larger kernels PEFT adds "
            f"the overlaps of the rotated patches up, which is no change of the weight"
        )
    if size == 0:
        module.divides("r", max(r, 1), base.in_features)
        size = base.in_features // max(r, 1)
    module.divides("oft_block_size", size, base.in_features)
    shared = bool(module.config.get("block_share"))
    blocks = base.in_features // size
    packed = module.part("oft_R", 1 if shared else blocks, size * (size - 1) // 2).double()
    terms = module.integer("num_cayley_neumann_terms", 5) if module.config.get("use_cayley_neumann", True) else 0
    if module.config.get("coft"):
        packed = _constrained(packed, module.number("eps", 6e-5))
    rotation = _cayley(packed, size, terms) - torch.eye(size, dtype=packed.dtype)
    return Delta(in_turn=Turn.of_blocks(rotation.transpose(1, 2).expand(blocks, size, size).float()))


def _constrained(packed: Tensor, eps: float) -> Tensor:
    """(blocks, n): the upper triangles of skew-symmetric matrices, of a norm of eps / sqrt(blocks) at most."""
    norm = torch.linalg.vector_norm(packed, dim=1, keepdim=True) * math.sqrt(2)  # of both triangles
    most = eps / math.sqrt(len(packed))
    return torch.where(norm <= most, packed, packed * (most / norm))


def _cayley(packed: Tensor, size: int, terms: int) -> Tensor:
    """(blocks, size, size): (I - Q)(I + Q)^-1 of the skew-symmetric Q whose upper triangles are `packed`; with
    `terms`, PEFT's series I + 2Q + 2Q^2 + ... + Q^last, which is that of -Q, cut off."""
    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(packed), size, size, dtype=packed.dtype)
    q[:, rows, columns] = packed
    q = q - q.transpose(1, 2)
    eye = torch.eye(size, dtype=q.dtype)
    if not terms:
        return torch.linalg.solve(eye + q, eye - q, left=False)
    result = power = eye.expand_as(q)
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    for term in range(1, last + 1):
        power = power @ q
        result = result + power * (1 if terms > 2 and term == last else 2)
    return result


OFT = Lowering(
    Format(
        parts={"oft_R.weight": "oft_R"},
        honoured={
            "r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps",
        },
        neutral={"module_dropout", "init_weights"},
        convs={2},
        grouped=True,
    ),
    delta,
)  # fmt: skip
