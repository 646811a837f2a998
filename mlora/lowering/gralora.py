"""GraLoRA: a k x k grid of LoRAs, one a block of the weight   (Jung et al., arXiv:2505.20355).

dW = s (grid + B_general A_general), s = alpha / (r + hybrid_r). `gralora_A` is (k, in / k, r) by input
block, `gralora_B` (k, r, out / k) by output block; block (o, i) multiplies rows o r/k .. (o+1) r/k of A's
rank with rows i r/k .. (i+1) r/k of B's. Each block's r / k rank rows are padded with zeros: rank k r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Delta, whole
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={
        "gralora_A": "gralora_A",
        "gralora_B": "gralora_B",
        "gralora_A_general.weight": "gralora_A_general",
        "gralora_B_general.weight": "gralora_B_general",
    },
    honoured={"r", "alpha", "gralora_k", "hybrid_r"},
    neutral={"gralora_dropout", "init_weights"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, rank, k = module.base, module.integer("r", 32), module.integer("gralora_k", 2)
    hybrid = module.integer("hybrid_r", 0, least=0)
    module.divides("gralora_k", k, base.in_features, base.out_features, rank)
    inputs, outputs, sub = base.in_features // k, base.out_features // k, rank // k
    blocks_a = module.part("gralora_A", k, inputs, rank).reshape(k, inputs, k, sub)  # input block, ., output block, row
    blocks_b = module.part("gralora_B", k, rank, outputs).reshape(k, k, sub, outputs)  # output block, input block, row
    scale = module.number("alpha", 64) / (rank + hybrid)
    general = None
    if hybrid:
        general = (
            module.part("gralora_A_general", hybrid, base.in_features),
            module.part("gralora_B_general", base.out_features, hybrid).t(),
        )
    if k * rank + hybrid >= min(base.in_features, base.out_features):

        def dense() -> Tensor:
            grid = torch.einsum("inos,oisp->opin", blocks_a.double(), blocks_b.double()).reshape(base.out_features, -1)
            return grid if general is None else grid + general[1].double().t() @ general[0].double()

        return whole(dense, base.out_features, base.in_features, scale)
    a, b = torch.zeros(k, k, sub, k, inputs), torch.zeros(k, k, sub, k, outputs)
    for o in range(k):
        for i in range(k):
            a[o, i, :, i] = blocks_a[i, :, o].t()
            b[o, i, :, o] = blocks_b[o, i]
    a, b = a.reshape(k * rank, base.in_features), b.reshape(k * rank, base.out_features)
    if general is not None:
        a, b = torch.cat([a, general[0]]), torch.cat([b, general[1]])
    return Delta(a, b, scale)


GRALORA = Lowering(FORMAT, delta)
