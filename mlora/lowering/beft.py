"""BEFT: y = base(x) + c   (arXiv:2509.15974), of which c is all that is trained, on modules with a bias or without."""

from __future__ import annotations

from .delta import Delta
from .module import Format, Lowering, Module

FORMAT = Format(parts={"beft_bias": "beft_bias"}, neutral={"init_weights"})


def delta(module: Module) -> Delta:
    """The delta of one module."""
    return Delta(shift=module.part("beft_bias", 1, module.base.out_features)[0])


BEFT = Lowering(FORMAT, delta, starts=lambda config: bool(config.get("init_weights", True)))
