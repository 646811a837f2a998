"""LoKr: dW = s kron(w1, w2), s = alpha / r   (Yeh et al., LyCORIS, arXiv:2309.14859).

Either factor may be a product of rank r. kron(b1 a1, b2 a2) = kron(b1, b2) kron(a1, a2), so the rank is
rank(w1) rank(w2), with a full factor counted by its smaller side. Where that is no less than
min(in, out), which is so where both are full, the delta is dense.

Of a convolution, w2 has the kernel, and is flattened, or in the Tucker form of LoHa's factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, Dense
from .loha import tucker
from .module import Format, Lowering, Module, scaling

FORMAT = Format(
    parts={key: key for key in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    honoured={"r", "alpha", "rank_pattern", "alpha_pattern"},
    neutral={
        "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d",
        "decompose_both", "decompose_factor",
    },
    convs={1, 2},
)  # fmt: skip


def delta(module: Module) -> Delta | Dense:
    """The delta of one module."""
    rank = module.integer("r", 8, "rank_pattern")
    if "lokr_w2" in module.parts and len(module.base.kernel) == 1:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: LoKr with a whole lokr_w2 is not served on a 1-d convolution, whose weight PEFT shuffles"
        )
    return kronecker(module, scaling(module, rank))


def kronecker(module: Module, scale: float) -> Delta | Dense:
    """scale kron(w1, w2), from whichever form of each factor the file holds."""
    if {"lokr_w2", "lokr_t2"} <= module.parts.keys():
        raise errors.AdapterError(f"{module.where}: it has lokr_w2 whole and a core lokr_t2 for its factors")
    (b1, a1), (b2, a2) = _factor(module, "lokr_w1"), _factor(module, "lokr_w2", module.base.kernel)
    outputs, inputs = b1.shape[0] * b2.shape[0], a1.shape[1] * a2.shape[1]
    module.fits(outputs, inputs)
    rank = a1.shape[0] * a2.shape[0]
    if rank >= min(outputs, inputs):
        return Dense(
            lambda: torch.kron((b1 @ a1).double(), (b2 @ a2).double()) * scale,
            f"its Kronecker factors have rank {rank}",
        )
    return Delta(torch.kron(a1.contiguous(), a2.contiguous()), torch.kron(b1, b2).t(), scale)


def _factor(module: Module, name: str, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """One factor as a product b a, through its smaller side where the file has it whole."""
    if name in module.parts:
        whole = module.matrix(name, None, None, kernel)
        rows, columns = whole.shape
        return (torch.eye(rows), whole) if rows <= columns else (whole, torch.eye(columns))
    if name == "lokr_w2" and "lokr_t2" in module.parts:
        rank = module.part(f"{name}_a", None, None).shape[0]
        return tucker(module, "lokr_t2", f"{name}_a", f"{name}_b", rank)
    b = module.part(f"{name}_a", None, None)
    return b, module.part(f"{name}_b", b.shape[1], None)


LOKR = Lowering(FORMAT, delta)
