"""DeLoRA: dW = B diag(lambda / (r |A_i| |B_i|)) A diag(w)   (Bini et al., arXiv:2503.18225).

|A_i| and |B_i| are the norms of rank row i, at least 1e-4; w are the column norms of the base weight
when training began, which the file holds.
"""

from __future__ import annotations

from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={key: key for key in ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")},
    honoured={"r", "rank_pattern"},
    neutral={"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"},  # lambda itself is in the file
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, rank = module.base, module.integer("r", 8, "rank_pattern")
    a, b = module.part("delora_A", rank, base.in_features), module.part("delora_B", base.out_features, rank).t()
    norms = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=1).clamp(min=1e-4)
    strength = module.part("delora_lambda", 1) / rank / norms
    return compact(a * module.part("delora_w_norm", base.in_features), b * strength[:, None])


DELORA = Lowering(FORMAT, delta)
