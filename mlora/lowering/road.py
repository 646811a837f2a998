"""RoAd: y = R (W x + b), R a 2-D rotation and scaling of pairs of outputs   (Liao & Monz, arXiv:2409.00119).

Outputs pair up within groups: the first half of a group with its second. R y = f * y + s * (y rotated by a
quarter turn): a turn of blocks of two outputs, half a group apart.
"""

from __future__ import annotations

import torch

from .. import errors
from .delta import Delta
from .module import Format, Lowering, Module
from .turn import Turn

FORMAT = Format(
    parts={"road_theta": "road_theta", "road_alpha": "road_alpha"},
    honoured={"variant", "group_size"},
    neutral={"init_weights"},
)

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # parameters for each output


def delta(module: Module) -> Delta:
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
    gain, cross = ((t - one).reshape(-1, 2, group // 2) for t, one in ((gain, 1), (cross, 0)))
    # The first output of a pair takes -s times the second, the second s times the first.
    values = torch.stack((torch.stack((gain[:, 0], cross[:, 1]), 1), torch.stack((-cross[:, 0], gain[:, 1]), 1)))
    return Delta(turn=Turn(values.reshape(2, -1).float(), group // 2))


ROAD = Lowering(FORMAT, delta)
