"""RoAd: y = R (W x + b), R a 2-D rotation and scaling of pairs of outputs   (Liao & Monz, arXiv:2409.00119).

Outputs pair up within groups: the first half of a group with its second. R y = f * y + s * (y rotated by a
quarter turn), so f is a gain and the rest, which mixes outputs, is a dense product with W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Dense
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={"road_theta": "road_theta", "road_alpha": "road_alpha"},
    honoured={"variant", "group_size"},
    neutral={"init_weights"},
)

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # parameters for each output


def delta(module: Module) -> Dense:
    """The delta of one module."""
    base, group, variant = module.base, module.integer("group_size", 64), module.config.get("variant", "road_1")
    if not isinstance(variant, str) or variant not in _SIZES:
        raise errors.AdapterError(f"adapter from {module.source}: variant is {variant!r}; known: {', '.join(_SIZES)}")
    module.divides("group_size", group, base.out_features)
    if group % 2:
        raise errors.AdapterError(f"adapter from {module.source}: group_size is {group}; it must be even")
    size = int(base.out_features * _SIZES[variant])
    theta, alpha = module.part("road_theta", size).double(), module.part("road_alpha", size).double()
    if variant == "road_1":  # the two of a pair share their parameters
        theta, alpha = (t.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten() for t in (theta, alpha))
    gain, cross = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_4":  # each group: first the parameters of f, then those of s
        gain, cross = gain.reshape(-1, 2, group)[:, 0].flatten(), cross.reshape(-1, 2, group)[:, 1].flatten()

    def turned(y: Tensor) -> Tensor:
        """cross * (y turned by a quarter), along dim 0."""
        halves = y.double().reshape(-1, 2, group // 2, *y.shape[1:])
        quarter = torch.stack((-halves[:, 1], halves[:, 0]), dim=1).reshape(y.shape)
        return quarter * cross.reshape(-1, *[1] * (y.dim() - 1))

    bias = base.bias()
    return Dense(
        lambda: turned(base.weight()),
        "it mixes the outputs of the base weight in pairs",
        gain=(gain - 1).float(),
        shift=None if bias is None else turned(bias).float(),
    )


ROAD = Lowering(FORMAT, delta)
