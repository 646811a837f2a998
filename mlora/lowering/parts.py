"""The parts of one module -> its delta: what belongs to its type, and what any type's files may hold beside."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import errors
from .delta import BaseLinear, Delta, Dense, laid_out
from .module import BASE_NAMES, TOKENS, Format, Lowering, Module
from .saved import saved
from .tokens import indices_of, trained_tokens

# What may change an embedding: LoRA, TinyLoRA, what mlora makes of several when it merges them, and training of tokens
# or of all.
_EMBEDDING_PARTS = {
    "lora_embedding_A",
    "lora_embedding_B",
    "delta_A",
    "delta_B",
    "delta_matrix",
    "delta_gain",
    "magnitude",
    "tinylora_A",
    "tinylora_B",
    "tinylora_P",
    "copy",
    "saved weight",
    TOKENS,
}

# What may change a norm.
_NORM_PARTS = {"saved weight", "base bias", "trained weight", "trained bias", "delta_gain", "delta_shift"}


def lower_module(module: Module, lowering: Lowering, trainable: bool = False) -> Delta | Dense:
    """The module's delta, with the shift from the base's bias to a saved one; for `trainable` see `lower`."""
    parts, base = module.parts, module.base
    if base.embed_scale is not None:
        allowed = _EMBEDDING_PARTS | ({"lora_A", "lora_B"} if module.parameter else set())
        if unserved := sorted(parts.keys() - allowed):
            raise errors.UnsupportedAdapterError(
                f"{module.where}: an embedding is served with LoRA or TinyLoRA only, or trained tokens; the file has "
                f"its {', '.join(unserved)}"
            )
    if base.offset is not None and (unserved := sorted(parts.keys() - _NORM_PARTS)):
        raise errors.UnsupportedAdapterError(
            f"{module.where}: it is a norm, of which a trained weight and bias are served; the file has its "
            f"{', '.join(unserved)}"
        )
    if "copy" in parts and not _is_copy(parts["copy"], base):
        raise errors.AdapterError(
            f"{module.where}: the file has its own copy of the base weight, of shape {tuple(parts['copy'].shape)}, "
            f"which is not this model's ({base.out_features}, {base.in_features}); was it made for another base?"
        )
    if base.conv is not None:
        _check_conv(module, lowering.format)
    if "saved weight" in parts:
        if parts.keys() - BASE_NAMES:
            raise errors.AdapterError(f"{module.where}: modules_to_save names it and the adapter targets it as well")
        kept = trainable and module.saved
        if len(parts) == 1 and not kept and _is_copy(parts["saved weight"], base):  # saved, and not trained
            return Delta()
        return saved(module, "saved weight", "base bias")
    if TOKENS in parts and parts.keys() != {TOKENS}:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: some of its tokens are trained and the adapter changes it as well, which PEFT does not "
            f"define"
        )
    if TOKENS in parts and not lowering.tied:
        return trained_tokens(module, indices_of(module))
    own = parts.keys() - BASE_NAMES
    delta = lowering.delta(module) if own else Delta()
    if "base bias" in parts:
        if (bias := base.bias()) is None:
            raise errors.AdapterError(f"{module.where}: the file has a trained base bias; the module has no bias")
        shift = module.part("base bias", base.out_features) - bias
        if isinstance(delta, Delta):
            return delta.shifted(shift)
        return replace(delta, shift=shift if delta.shift is None else delta.shift + shift)
    if own and module.config.get("bias", "none") != "none" and base.bias() is not None:
        raise errors.AdapterError(f"{module.where}: bias is {module.config['bias']!r} but the file has no bias for it")
    return delta


def _is_copy(tensor: Tensor, base: BaseLinear) -> bool:
    """Whether `tensor`, laid out as in the model and rounded to its dtype, is the base's weight."""
    rounded = tensor.to(base.dtype).float()
    if base.embed_scale is not None:
        return torch.equal(rounded.t() * base.embed_scale, base.weight())
    return tensor.shape == base.weight_shape and torch.equal(laid_out(rounded, base), base.weight())


def _check_conv(module: Module, format: Format) -> None:
    """Refuse what is not served on a convolution, or not on one of this kind."""
    conv, kind = module.base.conv, module.config.get("peft_type")
    assert conv is not None
    dims, own = len(conv.kernel), module.parts.keys() - BASE_NAMES
    if own and dims not in format.convs:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: it is a {dims}-d convolution, for which PEFT has no layer of type {kind}"
        )
    if own and conv.groups > 1 and not format.grouped:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: it is a convolution of {conv.groups} groups, on which {kind} is not served"
        )
    if "saved weight" in module.parts and not conv.zero_padded:
        raise errors.UnsupportedAdapterError(
            f"{module.where}: a saved weight is not served on a convolution that pads with other than zeros"
        )
