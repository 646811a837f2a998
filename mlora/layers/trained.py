"""A linear in a call with adapters that are being trained, as autograd records it."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from .. import errors
from ..arena.bits import DROP, GAIN, HEAD, LORA, SHIFT, TAIL
from ..gradients import functions
from ..gradients.parts import GAIN as MADE_AGAIN
from ..gradients.recorded import Site
from ..ops import dispatch


def trained(layer: Any, x: Tensor, site: Site, touches: int, plain: bool) -> Tensor:
    """What a `LoraLayer` makes of x: the bits of a call that is not recorded. `plain`: whether it is its weight, its
    bias and a delta, and nobody has parametrized these since.

    Raises:
        UnsupportedAdapterError: an adapter is trained here, and other rows have what is not served beside.
    """
    state, held = layer._mlora, layer._parameters
    if touches & (HEAD | TAIL):
        refuse_beside(state.name)
    drop = _drop(layer, x, site, touches) if layer.training else None
    if drop is None and plain and x.dtype is state.dtype and x.is_cpu:
        weight, bias = held["weight"], held["bias"]
        if not weight.requires_grad and (bias is None or not bias.requires_grad):
            layer._check_weight(weight)
            kblock = state.kblock(x) if state.fused and weight.is_contiguous() else dispatch.LIBRARY
            again = site.reads & MADE_AGAIN and not (bias is None and site.by_output)
            if kblock or not again:  # of what the library made, the output is kept
                return functions.linear(x, weight, bias, site, kblock)
    scale = partial(functions.scale, site=site) if site.inputs else None
    y, source = layer._bases(x, site.words, touches, scale)
    if drop is not None and _drops_base(site):
        source = layer._given(functions.drop(x, *drop))
    return functions.add(y, source, x, held.get("bias"), site, drop) if touches & (LORA | GAIN | SHIFT) else y


def _drop(layer: Any, x: Tensor, site: Site, touches: int) -> tuple[Tensor, Tensor] | None:
    """What tells which elements of x the adapters do not read; None where they read all."""
    state = layer._mlora
    if touches & DROP:
        places: tuple[Tensor, Tensor] = state.shared.active.get().drops.of(x, state.index, state.name)
        return places
    if any(one.drops and state.index in one.dropout.paths for one in site.trained.values()):
        raise errors.AttributionError(
            f"{state.name} runs outside of a call of the patched model, so that it cannot be told which rows an "
            f"adapter's lora_dropout is for; call the model itself, or train it with lora_dropout=0"
        )
    return None


def _drops_base(site: Site) -> bool:
    """Whether a DoRA here has dropout: its gain is of the base's product of what is left, as in PEFT. Rows that drop
    nothing have base(x) in that product, too."""
    return any(one.drops and one.parts[site.index].reads & MADE_AGAIN for one in site.trained.values())


def refuse_beside(name: str) -> NoReturn:
    """Of a module `name` where an adapter is trained, and whose rows or tokens are told apart in another way."""
    raise errors.UnsupportedAdapterError(
        f"{name}: an adapter is trained here, which is not served beside rows of an aLoRA or of a head or embedding of "
        f"another size"
    )


def refuse_training(what: str) -> NoReturn:
    """Of compiled code that autograd would record."""
    raise errors.UnsupportedAdapterError(
        f"{what} is compiled, and an adapter of the model has parameters, which are not trained under torch.compile; "
        f"run it under torch.no_grad, or call the model that is not compiled"
    )
