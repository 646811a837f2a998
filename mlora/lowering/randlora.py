"""RandLora: dW = s sum_j B_j diag(lambda_j) A diag(gamma_j)   (Albert et al., arXiv:2502.00987).

s = randlora_alpha / r. A, (r, 1, n), serves the smaller of the module's widths and B, (m, bases, r), the
larger, so for modules that widen the roles swap. With its ceil(n / r) bases the delta has full rank by
design: it is served exactly in min(in, out) rank rows, at the cost of a second copy of the weight.
"""

from __future__ import annotations

from .. import errors
from . import projections
from .delta import Delta, compact
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={
        "randlora_lambda": "randlora_lambda",
        "randlora_gamma": "randlora_gamma",
        "randlora_A": "own randlora_A",  # PEFT adds the shared matrices once more for each module
        "randlora_B": "own randlora_B",
    },
    honoured={"r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse"},
    neutral={"randlora_dropout", "init_weights"},
    shared={"base_model.randlora_A": "randlora_A", "base_model.randlora_B": "randlora_B"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    if not module.config.get("save_projection", True):
        raise errors.UnsupportedAdapterError(
            f"adapter from {module.source}: option save_projection=False is not served: the random bases are not in "
            "the file, and what PEFT draws for them depends on the machine; save the adapter with save_projection=True"
        )
    base, rank = module.base, module.integer("r", 32)
    low, high = sorted((base.in_features, base.out_features))
    bases = -(-low // rank)
    a, b = module.whole("randlora_A", rank, 1, None), module.whole("randlora_B", None, None, rank)
    outputs, inputs = projections.widest(module)
    module.covers("randlora_A", a.shape[2], min(outputs, inputs))
    module.covers("randlora_B", b.shape[0], max(outputs, inputs))
    module.covers("randlora_B", b.shape[1], bases)
    scales = module.part("randlora_lambda", rank, bases)
    gamma = module.part("randlora_gamma", bases, low)
    small = (scales[:, :, None] * a[:, :, :low] * gamma[None]).flatten(0, 1)  # (rank * bases, low)
    # PEFT flattens A over (rank, bases) and B over (bases, rank), and pairs them as they come.
    large = b[:high, :bases].flatten(1).t()  # (bases * rank, high)
    scale = module.number("randlora_alpha", 640) / rank
    return compact(small, large, scale) if low == base.in_features else compact(large, small, scale)


RANDLORA = Lowering(FORMAT, delta)
