"""GLoRA: W' = W + W * A + B, b' = b + b * D + E + W C   (Chavan et al., arXiv:2306.07967).

A and B are each a product of two factors (`lora`), a column (`vector`) or a number (`constant`), or nothing; D and E a
vector or a number, C a product or a vector, of modules with a bias. A column or a number A scales outputs, so it is a
gain; a column or a number B has rank 1. A product A multiplies W elementwise, as HiRA does, and has full rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from .delta import Delta, Dense
from .module import Format, Lowering, Module

FORMAT = Format(
    parts={f"glora_{path}.{part}": f"{path}.{part}" for path in "ABCDE" for part in ("X", "Xd", "Xu", "zeros")},
    honoured={"r", "config_A_B", "config_C", "config_D_E"},
    neutral={"init_weights"},
)


def delta(module: Module) -> Delta | Dense:
    """The delta of one module."""
    base = module.base
    outputs, inputs = base.out_features, base.in_features
    bias, factored = base.bias(), "A.Xd" in module.parts
    if bias is None and (extra := sorted(part for part in module.parts if part[0] in "CDE" and "zeros" not in part)):
        raise errors.AdapterError(f"{module.where}: it has a tensor {extra[0]} for a bias, and the module has none")
    shift = None if bias is None else _shift(module, bias)
    scales = None if factored else _path(module, "A", (outputs, 1))
    gain = None if scales is None else scales.expand(outputs, 1)[:, 0].contiguous()
    if gain is not None and bias is not None and shift is not None:
        shift = shift - gain * bias  # the gain is of the base's output, with its bias
    if factored:
        product, more = _path(module, "A", (outputs, inputs)), _path(module, "B", (outputs, inputs))
        assert product is not None

        def weight() -> Tensor:
            change = base.weight().double() * product.double()
            return change if more is None else change + more.double()

        return Dense(weight, "it multiplies the base weight elementwise", shift=shift)
    if "B.Xd" in module.parts:
        rank = module.integer("r", 8)
        b, a = module.part("B.Xd", outputs, rank), module.part("B.Xu", rank, inputs)
        return Delta(a, b.t(), gain=gain, shift=shift)
    column = _path(module, "B", (outputs, 1))
    if column is None:
        return Delta(gain=gain, shift=shift)
    return Delta(torch.ones(1, inputs), column.expand(outputs, 1).t().contiguous(), gain=gain, shift=shift)


def _shift(module: Module, bias: Tensor) -> Tensor:
    """b' - b."""
    base = module.base
    total = torch.zeros(base.out_features, dtype=torch.float64)
    if (scales := _path(module, "D", (base.out_features,))) is not None:
        total += bias.double() * scales.double()
    if (vector := _path(module, "E", (base.out_features,))) is not None:
        total += vector.double()
    if (reads := _path(module, "C", (base.in_features, 1))) is not None:
        total += (base.weight().double() @ reads.double())[:, 0]
    return total.float()


def _path(module: Module, path: str, shape: tuple[int, ...]) -> Tensor | None:
    """One of the five: of `shape`, or one number; None where the config has none and the file zeros."""
    if f"{path}.Xd" in module.parts:
        rank = module.integer("r", 8)
        return module.part(f"{path}.Xd", shape[0], rank) @ module.part(f"{path}.Xu", rank, shape[1])
    if f"{path}.X" in module.parts:
        one = module.parts[f"{path}.X"].shape == (1,)
        return module.part(f"{path}.X", *((1,) if one else shape))
    if f"{path}.zeros" not in module.parts:
        raise errors.AdapterError(f"{module.where}: glora_{path} is missing")
    if module.parts[f"{path}.zeros"].any():
        raise errors.AdapterError(f"{module.where}: glora_{path}.zeros has other values")
    return None


GLORA = Lowering(FORMAT, delta, starts=lambda config: bool(config.get("init_weights", True)))
