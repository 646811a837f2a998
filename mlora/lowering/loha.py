"""LoHa: dW = s (w1a w1b) * (w2a w2b), s = alpha / r   (Hyeon-Woo et al., FedPara, arXiv:2108.06098).

The elementwise product of two matrices of rank r has rank r^2 at most, and a form with that many rank
rows: the products of all pairs of columns and of rows (the row-wise Khatri-Rao product).

A convolution's factors are those of its flattened weight, or a Tucker form of it: with a core t of (r, r, *kernel),
w_a of (r, out) and w_b of (r, in), W[o, c, k] = sum_ij w_a[i, o] t[i, j, k] w_b[j, c]: of rank r once flattened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, whole
from .module import Format, Lowering, Module, scaling

FORMAT = Format(
    parts={key: key for key in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    honoured={"r", "alpha", "rank_pattern", "alpha_pattern"},
    neutral={"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"},
    convs={1, 2},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    rank = module.integer("r", 8, "rank_pattern")
    return hadamard(module, rank, scaling(module, rank))


def hadamard(module: Module, rank: int, scale: float) -> Delta:
    """scale (w1a w1b) * (w2a w2b), each pair of rank `rank`."""
    outputs, inputs = module.base.out_features, module.base.in_features
    if "hada_t1" in module.parts or "hada_t2" in module.parts:
        (b1, a1), (b2, a2) = (tucker(module, f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b", rank) for i in (1, 2))
        for b, a in ((b1, a1), (b2, a2)):
            module.fits(b.shape[0], a.shape[1])
    else:
        a1, a2 = (module.part(f"hada_w{i}_b", rank, inputs) for i in (1, 2))
        b1, b2 = (module.part(f"hada_w{i}_a", outputs, rank) for i in (1, 2))
    if rank * rank >= min(inputs, outputs):
        return whole(lambda: (b1.double() @ a1.double()) * (b2.double() @ a2.double()), outputs, inputs, scale)
    return Delta(_pairs(a1, a2), _pairs(b1.t(), b2.t()), scale)


def tucker(module: Module, core: str, outer: str, inner: str, rank: int) -> tuple[Tensor, Tensor]:
    """(rows, rank) and (rank, columns * kernel) whose product is the Tucker form of core (rank, rank, *kernel), outer
    (rank, rows) and inner (rank, columns)."""
    kernel = module.base.kernel
    if not kernel:
        raise errors.AdapterError(f"{module.where}: it has {core}, a convolution's, and is a linear in this model")
    if len(kernel) == 1 and core in module.parts and module.parts[core].dim() == 4:  # PEFT keeps a second dimension
        kernel = (*kernel, 1)
    t = module.part(core, rank, rank, *kernel).flatten(2)
    a = torch.einsum("ijk,jc->ick", t.double(), module.part(inner, rank, None).double()).flatten(1)
    b = module.part(outer, rank, None).t().clone(memory_format=torch.contiguous_format)
    return b, a.float()


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """(r, n) and (r, n) -> (r * r, n): every row of one times every row of the other."""
    return (first[:, None] * second[None]).flatten(0, 1)


LOHA = Lowering(FORMAT, delta)
