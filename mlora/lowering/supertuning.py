"""Super-Tuning: dW = S + (alpha / r) B A, S sparse   (arXiv:2607.09287), B A with an `r` only (Supra).

S has values where W is largest, or smallest. Files hold the places, as numbers into the flattened weight, or with
`save_precomputed_indices=False` the values alone: PEFT then finds the places anew by the magnitudes of W, and so does
this where they are all different. Where some are equal their order is the machine's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, Dense
from .dense import sparse
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={
        "supertuning_values": "supertuning_values",
        "supertuning_indices": "supertuning_indices",
        "supertuning_lora_A.weight": "supertuning_lora_A",
        "supertuning_lora_B.weight": "supertuning_lora_B",
    },
    honoured={"sparsity", "select_top", "r", "lora_alpha", "save_precomputed_indices"},
    neutral={"lora_dropout", "init_weights"},
    integers={"supertuning_indices"},
)


def delta(module: Module) -> Delta | Dense:
    """The delta of one module."""
    base, values = module.base, module.part("supertuning_values", None)
    outputs, inputs = base.out_features, base.in_features
    if module.config.get("save_precomputed_indices", True):
        places = module.part("supertuning_indices", len(values)).long()
        if places.min() < 0 or places.max() >= outputs * inputs:
            raise errors.AdapterError(
                f"{module.where}: supertuning_indices lie outside of its ({outputs}, {inputs}) weight"
            )
    else:
        places = _places(module, len(values))
    found = sparse(places // inputs, places % inputs, values, outputs, inputs)
    return _with_factors(module, found) if module.config.get("r") is not None else found


def _places(module: Module, count: int) -> Tensor:
    """Where W's magnitudes are the largest, or the smallest, in that order."""
    magnitudes, top = module.base.weight().abs().flatten(), bool(module.config.get("select_top", True))
    wanted = int(magnitudes.numel() * (1 - module.number("sparsity", 0.99)))
    module.expect("it has values for", count, wanted)
    found, places = torch.topk(magnitudes, min(count + 1, magnitudes.numel()), largest=top)
    if (found[1:] == found[:-1]).any():
        raise errors.UnsupportedAdapterError(
            f"{module.where}: option save_precomputed_indices=False is not served here: some magnitudes of its base "
            f"weight are equal, and which of their places a value belongs to depends on the machine; save the adapter "
            f"with save_precomputed_indices=True"
        )
    return places[:count]


def _with_factors(module: Module, found: Delta | Dense) -> Delta | Dense:
    base, rank = module.base, module.integer("r", 8)
    scale = module.number("lora_alpha", 0.0) / rank
    a = module.part("supertuning_lora_A", rank, base.in_features)
    b = module.part("supertuning_lora_B", base.out_features, rank)
    if isinstance(found, Dense):
        sparse_part = found.weight
        return replace(found, weight=lambda: sparse_part().double() + scale * (b.double() @ a.double()))
    assert found.a is not None and found.b is not None
    return Delta(torch.cat([found.a, a]), torch.cat([found.b, scale * b.t()]))


SUPERTUNING = Lowering(FORMAT, delta, starts=lambda config: bool(config.get("init_weights", True)))
