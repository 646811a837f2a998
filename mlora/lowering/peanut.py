"""PEANuT: dW = s (g(W^T A^T) B^T)^T, where g is a small network   (Zhong et al., arXiv:2410.01870).

It is nonlinear in W and linear in x: given W, h = g(W^T A^T) is an (in, r) matrix, and dW = s B h^T a LoRA. g applies
`depth` encoders and as many decoders, r x r each, with an activation before the first and after each, and adds to what
a decoder gives what its encoder got.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import errors
from .delta import Delta, compact
from .module import Format, Lowering, Module

_KINDS = ("encoders", "decoders")
_MOST = 64  # of a kind

FORMAT = Format(
    parts={
        "peanut_A.weight": "peanut_A",
        "peanut_B.weight": "peanut_B",
        **{f"peanut_{kind}.{i}.weight": f"peanut_{kind}.{i}" for kind in _KINDS for i in range(_MOST)},
    },
    honoured={"r", "depth", "act_fn", "scaling"},
    neutral={"init_weights"},
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base, rank, depth = module.base, module.integer("r", 32), module.integer("depth", 0, least=0)
    activate = _activation(module)

    def through(kind: str, i: int, hidden: Tensor) -> Tensor:
        coder: Tensor = module.part(f"peanut_{kind}.{i}", rank, rank).double()
        return activate(hidden @ coder.t())

    hidden = activate(base.weight().double().t() @ module.part("peanut_A", rank, base.out_features).double().t())
    kept: list[Tensor] = []
    for i in range(depth):
        kept.append(hidden)
        hidden = through("encoders", i, hidden)
    for i in range(depth):
        hidden = through("decoders", i, hidden) + kept[depth - 1 - i]
    b = module.part("peanut_B", base.out_features, rank)
    return compact(hidden.t().float().contiguous(), b.t(), module.number("scaling", 1.0))


def _activation(module: Module) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    name = module.config.get("act_fn", "relu")
    if not isinstance(name, str) or name not in ACT2FN:
        raise errors.AdapterError(f"adapter from {module.source}: act_fn is {name!r}, which transformers lacks")
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found


PEANUT = Lowering(FORMAT, delta, starts=lambda config: bool(config.get("init_weights", True)))
