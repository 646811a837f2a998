"""LoHa: dW = s (w1a w1b) * (w2a w2b), s = alpha / r   (Hyeon-Woo et al., FedPara, arXiv:2108.06098).

The elementwise product of two matrices of rank r has rank r^2 at most, and a form with that many rank
rows: the products of all pairs of columns and of rows (the row-wise Khatri-Rao product).
"""

from __future__ import annotations

from torch import Tensor

from .delta import Delta, whole
from .module import Format, Lowering, Module, scaling

FORMAT = Format(
    parts={key: key for key in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    honoured={"r", "alpha", "rank_pattern", "alpha_pattern"},
    neutral={"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    rank = module.integer("r", 8, "rank_pattern")
    return hadamard(module, rank, scaling(module, rank))


def hadamard(module: Module, rank: int, scale: float) -> Delta:
    """scale (w1a w1b) * (w2a w2b), each pair of rank `rank`."""
    outputs, inputs = module.base.out_features, module.base.in_features
    a1, a2 = (module.part(f"hada_w{i}_b", rank, inputs) for i in (1, 2))
    b1, b2 = (module.part(f"hada_w{i}_a", outputs, rank) for i in (1, 2))
    if rank * rank >= min(inputs, outputs):
        return whole((b1.double() @ a1.double()) * (b2.double() @ a2.double()), scale)
    return Delta(_pairs(a1, a2), _pairs(b1.t(), b2.t()), scale)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """(r, n) and (r, n) -> (r * r, n): every row of one times every row of the other."""
    return (first[:, None] * second[None]).flatten(0, 1)


LOHA = Lowering(FORMAT, delta)
