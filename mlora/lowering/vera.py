"""VeRA: dW = diag(lambda_b) B[:out] diag(lambda_d) A[:, :in]   (Kopiczko et al., arXiv:2310.11454).

A and B are random and shared by all modules; only the lambdas are trained.
"""

from __future__ import annotations

from . import projections
from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
    honoured={"r", "projection_prng_key", "save_projection"},
    neutral={"vera_dropout", "d_initial", "init_weights"},
    shared={"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, rank = module.base, module.integer("r", 256)
    outputs, inputs = projections.widest(module)
    if module.config.get("save_projection", True):
        a, b = module.whole("vera_A", rank, None), module.whole("vera_B", None, rank)
        module.covers("vera_A", a.shape[1], inputs)
        module.covers("vera_B", b.shape[0], outputs)
    else:
        a, b = projections.kaiming(projections.seed(module), (rank, inputs), (outputs, rank))
    lambda_b, lambda_d = module.part("vera_lambda_b", base.out_features), module.part("vera_lambda_d", rank)
    return compact(a[:, : base.in_features] * lambda_d[:, None], (b[: base.out_features] * lambda_b[:, None]).t())


VERA = Lowering(FORMAT, delta)
