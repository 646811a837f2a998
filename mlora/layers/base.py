"""What a lowering may ask of a module: its dense weight, its bias, its widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import errors
from ..lowering import BaseLinear, Conv
from ..lowering.delta import spread
from .conv import CONVS
from .cuts import cut_of
from .dense import DENSE, compute_dtype, is_cast, is_dense, is_split, tensors_of
from .norm import is_norm_like, norm_offset
from .owners import owners_of
from .placed import offloaded
from .swap import twin_of

_IDENTITY_ROWS = 1024  # of the identity that is sent through a quantized linear at a time


def base_linears(
    model: nn.Module,
    paths: Mapping[str, nn.Module],
    originals: Callable[[str], Mapping[str, Tensor]] = lambda _: {},
) -> dict[str, BaseLinear]:
    """`base_linear` of each of `paths`, and what they are to each other: dotted path -> module of `model`."""
    bases = {
        name: base_linear(name, module, partial(_elsewhere, model, module, originals, name))
        for name, module in paths.items()
    }
    modules: dict[int, list[str]] = {}
    weights: dict[int, list[str]] = {}
    held: dict[str, int] = {}
    for name, module in paths.items():
        weight = module._parameters.get("weight")
        held[name] = id(module if weight is None else weight)
    for name, module in paths.items():
        modules.setdefault(id(module), []).append(name)
        weights.setdefault(held[name], []).append(name)
    owners = owners_of(model, paths)
    answers = getattr(model, "get_output_embeddings", lambda: None)()
    last = next((name for name in reversed(bases) if bases[name].offset is None), None)
    for name, module in paths.items():
        aliases = tuple(other for other in modules[id(module)] if other != name)
        tied = tuple(n for n in weights[held[name]] if n != name and n not in aliases)
        head = (name == last or module is answers) and type(module) is nn.Linear
        bases[name] = replace(
            bases[name], aliases=aliases, tied=tied, head=head, answers=module is answers, owner=owners.get(name, "")
        )
    return bases


def base_linear(name: str, module: nn.Module, originals: Callable[[], Mapping[str, Tensor]] = dict) -> BaseLinear:
    """What a lowering may ask of `module`. `originals` gives the weight and bias where the module's own are not the
    base's, because something is folded in or they are offloaded."""
    if isinstance(module, CONVS):
        return _base_conv(name, module, originals)
    transposed, embed_scale = isinstance(module, (Conv1D, nn.Embedding)), None
    if isinstance(module, nn.Embedding):  # in the dtype in which it multiplies
        embed_scale = float(
            torch.as_tensor(getattr(module, "embed_scale", 1.0), dtype=torch.float64).to(module.weight.dtype)
        )
    norm = is_norm_like(module)
    if transposed:
        in_features, out_features = cast(Tensor, module.weight).shape
    elif norm:
        in_features = out_features = len(cast(Tensor, module.weight))
    else:
        in_features, out_features = cast(nn.Linear, module).in_features, cast(nn.Linear, module).out_features

    def weight() -> Tensor:
        dense = _dense(name, module, originals)
        dense = dense.t() if transposed else dense
        dense = dense if embed_scale in (None, 1.0) else dense * embed_scale
        if norm:
            return dense.flatten()
        if dense.shape != (out_features, in_features):
            raise errors.UnsupportedAdapterError(
                f"module {name}: its weight dequantizes to shape {tuple(dense.shape)}; it must be "
                f"({out_features}, {in_features})"
            )
        return dense

    def held() -> Tensor | None:
        tensor: Any = originals().get("weight", getattr(module, "weight", None))
        if embed_scale is not None or norm or not is_dense(tensor) or tensor.is_meta or is_split(tensor):
            return None
        tensor = tensor.detach().t() if transposed else tensor.detach()
        return cast(Tensor, tensor) if tensor.shape == (out_features, in_features) else None

    offset = norm_offset(module) if norm else None
    plain = is_dense(getattr(module, "weight", None)) and (embed_scale is not None or _is_plain(module))
    return BaseLinear(
        name, in_features, out_features, weight, lambda: _bias(module, originals), embed_scale, _dtype(module), offset,
        _device(module), turned=transposed if plain else None, cut=cut_of(module), held=held,
    )  # fmt: skip


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear that does nothing else."""
    forward = twin_of(module)[1].forward
    return forward is nn.Linear.forward or forward is Conv1D.forward


def _base_conv(name: str, module: nn.Module, originals: Callable[[], Mapping[str, Tensor]]) -> BaseLinear:
    conv = cast(nn.Conv2d, module)
    kernel, padding = tuple(conv.kernel_size), conv.padding
    kind = Conv(
        kernel,
        conv.groups,
        dilated=any(size > 1 and step > 1 for size, step in zip(kernel, conv.dilation, strict=True)),
        zero_padded=conv.padding_mode == "zeros" or not any(conv._reversed_padding_repeated_twice),
        even=not isinstance(padding, str) and len({*zip(kernel, conv.stride, padding, strict=True)}) == 1,
    )

    def weight() -> Tensor:
        return spread(_dense(name, module, originals).flatten(1), conv.groups)

    inputs = conv.in_channels * math.prod(kernel)
    return BaseLinear(
        name, inputs, conv.out_channels, weight, lambda: _bias(module, originals), dtype=_dtype(module), conv=kind
    )


def _elsewhere(
    model: nn.Module, module: nn.Module, originals: Callable[[str], Mapping[str, Tensor]], name: str
) -> Mapping[str, Tensor]:
    """What something that is folded in has taken the place of, or else what accelerate keeps for the module."""
    return originals(name) or offloaded(model, module)


def _dense(name: str, module: nn.Module, originals: Callable[[], Mapping[str, Tensor]]) -> Tensor:
    """The weight as the module keeps it, dense, in fp32 on the CPU: a copy, since folding changes it in place."""
    held = originals()
    tensor = held.get("weight", getattr(module, "weight", None))
    if any(t.is_meta for t in tensors_of(module)) and not is_dense(held.get("weight")):
        raise errors.UnsupportedAdapterError(
            f"module {name}: this adapter's delta depends on the base weight, which is offloaded "
            f"({type(module).__name__})"
        )
    if not is_dense(tensor) and not is_cast(twin_of(module)[0]):
        tensor = dequantize(name, module)
    return _whole(cast(Tensor, tensor)).to("cpu", torch.float32, copy=True)


def _bias(module: nn.Module, originals: Callable[[], Mapping[str, Tensor]]) -> Tensor | None:
    tensor = originals().get("bias", getattr(module, "bias", None))
    if isinstance(tensor, Tensor) and tensor.is_meta:
        raise errors.UnsupportedAdapterError(
            f"a {type(module).__name__}: this adapter's delta depends on its bias, which is offloaded"
        )
    return _whole(tensor).to("cpu", torch.float32, copy=True) if isinstance(tensor, Tensor) else None


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is split over processes, each of which asks for it; any other as it is."""
    with torch.no_grad():
        return tensor.full_tensor() if is_split(tensor) else tensor.detach()  # type: ignore[attr-defined]


def _dtype(module: nn.Module) -> torch.dtype:
    held: Any = getattr(module, "weight", None)
    return cast(torch.dtype, held.dtype) if is_dense(held) else torch.float32


def _device(module: nn.Module) -> torch.device:
    held: Any = getattr(module, "weight", None)
    return held.device if isinstance(held, Tensor) and not held.is_meta else torch.device("cpu")


def dequantize(name: str, module: nn.Module) -> Tensor:
    """The dense weight of a quantized linear, laid out as its `weight` would be.

    Tensor subclasses that define `dequantize` (torchao, quanto) are asked; so is bitsandbytes for its own. For any
    other module, packed in whatever way, it is what the module makes of the identity, in its activations' dtype; and so
    it is for bitsandbytes' 4 bits on the CPU, which the first call packs once more, with scales rounded to bf16.

    Raises:
        UnsupportedAdapterError: the module or its library fails at it.
    """
    weight: Any = getattr(module, "weight", None)
    try:
        with torch.no_grad():
            if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
                dense: Tensor = weight.dequantize()
                return dense
            state = getattr(weight, "quant_state", None)  # bitsandbytes, 4 bits
            if state is not None and weight.device.type != "cpu":
                from bitsandbytes import functional

                dense = functional.dequantize_4bit(weight.data, state)
                return dense
            scales = getattr(weight, "SCB", None)  # bitsandbytes, 8 bits: they move into `state` at the first call
            scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
            if scales is not None:
                return weight.data.float() * (scales.float() / 127)[:, None]
            return _through_identity(module)
    except Exception as error:
        raise errors.UnsupportedAdapterError(
            f"module {name}: this adapter's delta depends on the base weight, which could not be dequantized "
            f"({type(module).__name__}: {type(error).__name__}: {error})"
        ) from error


def _through_identity(module: nn.Module) -> Tensor:
    """W, (out, in), of a linear by its own forward, called on a twin without bias: a sum with it would be rounded."""
    twin, cls = twin_of(module)
    for kind in ("_parameters", "_buffers"):
        held = dict(module.__dict__[kind])
        if isinstance(held.get("bias"), Tensor):
            held["bias"] = torch.zeros_like(held["bias"])
        twin.__dict__[kind] = held
    device = next(tensors_of(module)).device
    usual = next((t.dtype for t in tensors_of(module) if t.dtype in DENSE), None) or twin.weight.quant_state.dtype
    width, dtype = twin.in_features, compute_dtype(module, usual)
    columns = []
    for start in range(0, width, _IDENTITY_ROWS):
        rows = torch.arange(start, min(start + _IDENTITY_ROWS, width), device=device)
        x = torch.zeros(len(rows), width, dtype=dtype, device=device)
        x[torch.arange(len(rows)), rows] = 1
        columns.append(cls.forward(twin, x).float() - cls.forward(twin, torch.zeros_like(x[:1])).float())
    return torch.cat(columns).t()
