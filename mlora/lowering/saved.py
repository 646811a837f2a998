"""Modules that were trained whole, and are saved as they are: `modules_to_save`, and LN tuning (Zhao et al.,
arXiv:2312.11420), which trains copies of norms.

    linear     y = W' x + b'             dW = W' - W as it is, c = b' - b; a convolution's too
    embedding  y = embed_scale W'[ids]   the same, of one-hot inputs
    norm       y = n (w' + k) + b'       g = (w' + k) / (w + k), c = b' - g b, since the base gives n (w + k) + b
    head       y = W' x + b'             of another size: in place of the base's
    tokens     y = embed_scale W'[ids]   of another number: in place of the base's
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .. import errors
from .delta import BaseLinear, Delta, laid_out, whole
from .module import Format, Lowering, Module

# How many times the largest value of a trained norm the base's may grow under the gain before its bias is taken out
# again: its rounding grows with it.
_CANCELLATION = 4


def saved(module: Module, weight: str, bias: str) -> Delta:
    """The delta from the base to a trained module; `weight` and `bias` are the names of its parts.

    Raises:
        AdapterError: it has other parts than the base. UnsupportedAdapterError: no delta is exact.
    """
    base = module.base
    if base.aliases:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: it is one module with {', '.join(base.aliases)}, of which PEFT trains a copy at one "
            f"place only; it is not served"
        )
    if (bias in module.parts) != (base.bias() is not None):
        state = "has a bias for it, which it lacks" if bias in module.parts else "has no bias for it"
        raise errors.AdapterError(f"{module.where}: it was trained whole, but the file {state}")
    if base.offset is not None:
        return _norm(module, base.offset, weight, bias)
    if base.embed_scale is not None:
        if module.parts[weight].shape[:1] != (base.in_features,):
            return Delta(module.part(weight, None, base.out_features), replaces=True, trained=True)
        scale = base.embed_scale
        tokens = module.part(weight, base.in_features, base.out_features)
        return replace(_change(base, lambda: tokens.double().t() * scale), trained=True)
    if base.head and module.parts[weight].shape[:1] != (base.out_features,):
        head = module.part(weight, None, base.in_features)
        return Delta(head, shift=module.part(bias, head.shape[0]) if bias in module.parts else None, replaces=True)
    trained = module.part(weight, *base.weight_shape)
    shift = module.part(bias, base.out_features) - _bias(module) if bias in module.parts else None
    return replace(_change(base, lambda: laid_out(trained, base).double()), shift=shift)


def _change(base: BaseLinear, trained: Callable[[], Tensor]) -> Delta:
    """From the base's weight to the trained one."""
    outputs, inputs = base.out_features, base.in_features
    return whole(lambda: trained() - base.weight().double(), outputs, inputs, parameter=True)


def _bias(module: Module) -> Tensor:
    bias = module.base.bias()
    assert bias is not None
    return bias


def _norm(module: Module, offset: float, weight: str, bias: str) -> Delta:
    base, width = module.base, module.base.out_features
    before, after = base.weight().double() + offset, module.part(weight, width).double() + offset
    change = after - before
    if lost := int(((before == 0) & (change != 0)).sum()):
        raise errors.UnsupportedAdapterError(
            f"{module.where}: this model's norm has zeros among its weights ({lost} of {width}), from which no factor "
            f"leads to the trained ones"
        )
    gain = (change / before).masked_fill(before == 0, 0.0)  # g - 1
    if bias not in module.parts:
        return Delta(gain=gain.float())
    old, new = _bias(module).double(), module.part(bias, width).double()
    grown = ((1 + gain).abs() * (before.abs() + old.abs())).max()
    if grown > _CANCELLATION * (after.abs() + new.abs()).max():
        raise errors.UnsupportedAdapterError(
            f"{module.where}: some weights of this model's norm are so small beside its bias that the trained norm "
            f"cannot be made of its output"
        )
    return Delta(gain=gain.float(), shift=(new - (1 + gain) * old).float())


LN_TUNING = Lowering(
    Format(parts={"ln_tuning_layers.weight": "trained weight", "ln_tuning_layers.bias": "trained bias"}),
    lambda module: saved(module, "trained weight", "trained bias"),
    norms=True,
)
