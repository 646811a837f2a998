"""LoKr: dW = s kron(w1, w2), s = alpha / r   (Yeh et al., LyCORIS, arXiv:2309.14859).

Either factor may be a product of rank r. kron(b1 a1, b2 a2) = kron(b1, b2) kron(a1, a2), so the rank is
rank(w1) rank(w2), with a full factor counted by its smaller side. Where that is no less than
min(in, out), which is so where both are full, the delta is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, Dense
from .module import Format, Lowering, Module, scaling

FORMAT = Format(
    parts={key: key for key in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    honoured={"r", "alpha", "rank_pattern", "alpha_pattern"},
    neutral={
        "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d",
        "decompose_both", "decompose_factor",
    },
)  # fmt: skip


def delta(module: Module) -> Delta | Dense:
    """The delta of one module."""
    rank = module.integer("r", 8, "rank_pattern")
    return kronecker(module, scaling(module, rank))


def kronecker(module: Module, scale: float) -> Delta | Dense:
    """scale kron(w1, w2), from whichever form of each factor the file holds."""
    (b1, a1), (b2, a2) = _factor(module, "lokr_w1"), _factor(module, "lokr_w2")
    outputs, inputs = b1.shape[0] * b2.shape[0], a1.shape[1] * a2.shape[1]
    if (outputs, inputs) != (module.base.out_features, module.base.in_features):
        raise errors.AdapterError(
            f"{module.where}: its factors make a ({outputs}, {inputs}) matrix, the module's is "
            f"({module.base.out_features}, {module.base.in_features})"
        )
    rank = a1.shape[0] * a2.shape[0]
    if rank >= min(outputs, inputs):
        return Dense(
            lambda: torch.kron((b1 @ a1).double(), (b2 @ a2).double()) * scale,
            f"its Kronecker factors have rank {rank}",
        )
    return Delta(torch.kron(a1.contiguous(), a2.contiguous()), torch.kron(b1, b2).t(), scale)


def _factor(module: Module, name: str) -> tuple[Tensor, Tensor]:
    """One factor as a product b a, through its smaller side where the file has it whole."""
    if name in module.parts:
        whole = module.part(name, None, None)
        rows, columns = whole.shape
        return (torch.eye(rows), whole) if rows <= columns else (whole, torch.eye(columns))
    b = module.part(f"{name}_a", None, None)
    return b, module.part(f"{name}_b", b.shape[1], None)


LOKR = Lowering(FORMAT, delta)
