"""PVeRA: VeRA whose hidden vector is a random one   (arXiv:2512.07703). A and lambda_d have 2 r rows: the first r give
its mean, the others the logarithm of its variance. The mean is served, as PEFT does unless `sample_at_inference`:

    dW = diag(lambda_b) B[:out] diag(lambda_d[:r]) A[:r, :in]
"""

from __future__ import annotations

from . import projections
from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={"pvera_lambda_b": "pvera_lambda_b", "pvera_lambda_d": "pvera_lambda_d"},
    honoured={"r", "projection_prng_key", "save_projection"},
    neutral={"pvera_dropout", "d_initial", "init_weights", "generator_seed"},
    shared={"base_model.pvera_A": "pvera_A", "base_model.pvera_B": "pvera_B"},
    notes={"sample_at_inference": "each call would draw random numbers"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, rank = module.base, module.integer("r", 256)
    outputs, inputs = projections.widest(module)
    if module.config.get("save_projection", True):
        a, b = module.whole("pvera_A", 2 * rank, None), module.whole("pvera_B", None, rank)
        module.covers("pvera_A", a.shape[1], inputs)
        module.covers("pvera_B", b.shape[0], outputs)
    else:
        a, b = projections.kaiming(projections.seed(module), (2 * rank, inputs), (outputs, rank))
    lambda_b = module.part("pvera_lambda_b", base.out_features)
    lambda_d = module.part("pvera_lambda_d", 2 * rank)[:rank]
    return compact(a[:rank, : base.in_features] * lambda_d[:, None], (b[: base.out_features] * lambda_b[:, None]).t())


PVERA = Lowering(FORMAT, delta)
