"""DEFT: W' = (I - Q P^T) W + s Q R   (Decompositional Efficient Fine-Tuning, NeurIPS 2025); PaRa is that without R.

    relu  Q = P', P = relu(P')            of the trained P', (out, r)
    qr    Q = P = the Q of P' = Q (...)

Given W the delta is a LoRA: dW = Q (s R - P^T W). s is alpha / r, or 1 without an alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={"deft_P": "deft_P", "deft_R": "deft_R"},
    honoured={"r", "decomposition_method", "alpha", "para"},
    neutral={"deft_dropout", "init_scale", "init_weights"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    config, base = module.config, module.base
    rank, method = min(module.integer("r", 8), base.out_features), config.get("decomposition_method", "relu")
    trained = module.part("deft_P", base.out_features, rank).double()
    if method == "relu":
        q, p = trained, torch.relu(trained)
    elif method == "qr":
        q = p = torch.linalg.qr(trained)[0]
    else:
        raise errors.AdapterError(
            f"adapter from {module.source}: decomposition_method is {method!r}; it must be 'relu' or 'qr'"
        )
    a = -p.t() @ base.weight().double()
    if config.get("para"):
        if "deft_R" in module.parts:
            raise errors.AdapterError(f"{module.where}: para is {config['para']!r} but it has a deft_R tensor")
    else:
        scale = module.number("alpha", 0.0) / rank if config.get("alpha") else 1.0
        a += scale * module.part("deft_R", rank, base.in_features).double()
    return compact(a.float(), q.t().float())


def _starts(config: Mapping[str, Any]) -> bool:
    """PEFT chooses R so that the delta is zero."""
    return bool(config.get("init_weights", True)) and not config.get("para")


DEFT = Lowering(FORMAT, delta, starts=_starts)
