"""OSF: W' = U_k S_k V_k^T + U S V^T   (arXiv:2504.07097), of which U_k S_k V_k^T, W's k largest singular triplets,
stays and the others are trained: dW = U S V^T - U_0 S_0 V_0^T, twice as many rank rows as there are others.

Files hold U, S and V. The rest is computed from W in fp32, as PEFT does it; signs of singular vectors cancel. Where the
rank rows are more than W has rows or columns, the change itself is stored, at the price of a copy of the weight.
"""

from __future__ import annotations

import torch

from .. import errors
from .delta import Delta, compact, minus
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={f"osf_svd_params.{part}_low": part for part in "USV"},
    empty={*"USV"},
    neutral={"effective_rank", "rank_pattern", "init_weights"},  # the rank is in the tensors
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, most = module.base, min(module.base.in_features, module.base.out_features)
    if module.parts.keys() >= {*"USV"} and not any(module.parts[part].numel() for part in "USV"):
        return Delta()  # k is all that it has
    values = module.part("S", None)
    if len(values) > most:
        raise errors.AdapterError(f"{module.where}: it has {len(values)} singular values, its weight {most}")
    a, b = module.part("V", len(values), base.in_features), module.part("U", base.out_features, len(values)) * values
    u, s, vh = torch.linalg.svd(base.weight(), full_matrices=False)
    kept = most - len(values)
    return compact(*minus(a, b.t(), vh[kept:], (u[:, kept:] * s[kept:]).t()))


OSF = Lowering(FORMAT, delta, starts=lambda config: config.get("init_weights", True) is not False)
