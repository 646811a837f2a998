"""VB-LoRA: dW = B A, whose rows are mixtures from one bank of vectors   (Li et al., arXiv:2405.15179).

Each piece of `vector_length` numbers is sum_k softmax(top-k logits)_k bank[index_k]. Files hold the logits,
or with `save_only_topk_weights` the indices and all weights but the last, which makes the sum 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={
        f"vblora_logits_{side}{kind}": f"vblora_logits_{side}{kind}"
        for side in "AB"
        for kind in ("", "_topk_indices", "_topk_weights")
    },
    honoured={"r", "num_vectors", "vector_length", "topk", "save_only_topk_weights"},
    neutral={"vblora_dropout", "init_vector_bank_bound", "init_logits_std"},
    shared={"base_model.vblora_vector_bank": "vblora_vector_bank"},
    integers={"vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    rank, length = module.integer("r", 4), module.integer("vector_length", 256)
    base = module.base
    module.divides("vector_length", length, base.in_features, base.out_features)
    a = _mixtures(module, "A", rank, base.in_features // length)  # (rank, tiles, length)
    b = _mixtures(module, "B", base.out_features // length, rank)  # (tiles, rank, length)
    return compact(a.flatten(1), b.transpose(0, 1).flatten(1))


def _mixtures(module: Module, side: str, first: int, second: int) -> Tensor:
    """(first, second, vector_length)."""
    key, topk, vectors = f"vblora_logits_{side}", module.integer("topk", 2), module.integer("num_vectors", 256)
    bank = module.whole("vblora_vector_bank", vectors, module.integer("vector_length", 256))
    if topk > vectors:
        raise errors.AdapterError(f"adapter from {module.source}: topk is {topk} of {vectors} vectors")
    if module.config.get("save_only_topk_weights"):
        indices = module.part(f"{key}_topk_indices", first, second, topk).long()
        if indices.min() < 0 or indices.max() >= vectors:
            raise errors.AdapterError(
                f"{module.where}: {key}_topk_indices name vectors outside of the bank's {vectors}"
            )
        leading = module.part(f"{key}_topk_weights", first, second, topk - 1)
        weights = torch.cat([leading, 1 - leading.sum(-1, keepdim=True)], dim=-1)
    else:
        values, indices = module.part(key, first, second, vectors).topk(topk, dim=-1)
        weights = torch.softmax(values, dim=-1)
    result = torch.zeros(first, second, bank.shape[1])
    for k in range(topk):  # not all at once: that would take topk times the memory of the result
        result += weights[..., k, None] * bank[indices[..., k]]
    return result


VBLORA = Lowering(FORMAT, delta, starts=lambda config: False)  # its logits start as random numbers
