"""IA3: y = l * (W x + b), or W (l * x) + b for feed-forward modules   (Liu et al., arXiv:2205.05638).

A gain, or an input gain. `ia3_l` is (out, 1), or (1, in) for feed-forward modules; a convolution's is (1, channels, 1,
1), of output channels or of input channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .delta import Delta
from .module import Format, Lowering, Module
from .targets import full_match

FORMAT = Format(
    parts={"ia3_l": "ia3_l"},
    honoured={"feedforward_modules"},
    neutral={"init_ia3_weights"},
    convs={2, 3},
    grouped=True,
)


def delta(module: Module) -> Delta:
    """The delta of one module."""
    base = module.base
    if is_feedforward(module.config, module.file):
        gain = module.matrix("ia3_l", 1, base.channels)[0] - 1
        return Delta(in_gain=gain.repeat_interleave(math.prod(base.kernel)))
    if base.conv is not None:
        return Delta(gain=module.matrix("ia3_l", 1, base.out_features)[0] - 1)
    return Delta(gain=module.part("ia3_l", base.out_features, 1)[:, 0] - 1)


def is_feedforward(config: Mapping[str, Any], name: str) -> bool:
    """Whether `feedforward_modules` names the module, so that its input has the gain."""
    names = config.get("feedforward_modules") or []
    if isinstance(names, str):
        return full_match(names, name) is not None
    return any(name.endswith(suffix) for suffix in names)  # PEFT takes any ending, not whole names only


IA3 = Lowering(FORMAT, delta)
