"""Which modules of a model are patched, and with which layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .conv import CONVS, ConvLayer, is_conv
from .dense import is_dense, tensors_of
from .embedding import EmbeddingLayer
from .linear import LoraLayer
from .norm import NormLayer, is_norm_like, norm_offset
from .parameters import ParametersLayer, Stack, stacks_of
from .swap import bound_forwards, twin_of

# Where PEFT's layers, and its copies of whole modules, keep the model's own.
_INNER = ("base_layer", "original_module")

MODULE_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)


def mixin_of(module: nn.Module) -> type[LoraLayer]:
    """The layer class that serves a module of `find_layers` or `find_stacks`."""
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer
    if isinstance(module, CONVS):
        return ConvLayer
    if is_norm_like(module):
        return NormLayer
    if isinstance(module, MODULE_CLASSES) or is_packed_linear(module):
        return LoraLayer
    return ParametersLayer


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted path -> every module that can be patched; a shared module comes once for each path.

    These are linears, convolutions, embeddings of tokens, and norms. Those whose owner reads their weight without
    calling them are left out, since a layer there would silently do nothing: `nn.MultiheadAttention`'s projections and
    `nn.TransformerEncoderLayer`'s linears and norms. So are subclasses of linears that give something else.
    """
    bypassed = {
        id(child)
        for module in model.modules()
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        for child in module.children()
    }
    tokens = {id(module) for module in token_embeddings(model)}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and id(module) not in bypassed
        and (
            (isinstance(module, MODULE_CLASSES) and not _gives_other(module))
            or id(module) in tokens
            or is_conv(module)
            or is_packed_linear(module)
            or norm_offset(module) is not None
        )
    }


def _gives_other(module: nn.Module) -> bool:
    """Whether it is a subclass with a forward of its own that gives no linear's output, as routers that give what they
    choose. Where that cannot be tried without numbers, layers look at what they get."""
    twin, cls = twin_of(module)
    weight: Any = module._parameters.get("weight")
    if cls.forward in (nn.Linear.forward, Conv1D.forward) or not is_dense(weight):
        return False
    twin.__dict__["_parameters"] = {
        name: None if held is None else torch.empty(held.shape, dtype=held.dtype, device="meta")
        for name, held in module._parameters.items()
    }
    x = torch.empty(2, twin.in_features, dtype=weight.dtype, device="meta")
    try:
        with torch.no_grad():
            y = cls.forward(twin, x)
    except Exception:
        return False
    return not isinstance(y, Tensor) or y.shape != (2, twin.out_features)


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """Dotted path -> every parameter of fused experts, and every matrix that a module which is not patched otherwise
    holds itself, in the order in which modules register them. A shared module comes once, as it does in PEFT; one whose
    `forward` somebody has replaced, so that it cannot be called under other weights, does not."""
    return {
        f"{path}.{name}": Stack(module, name)
        for path, module in model.named_modules()
        if path
        and mixin_of(module) is ParametersLayer
        and ("forward" not in module.__dict__ or bound_forwards(module, type(module).forward))
        for name in stacks_of(module)
    }


def token_embeddings(model: nn.Module) -> Iterator[nn.Embedding]:
    """What parts of `model` name as their `get_input_embeddings`. Other embeddings are left out, since what they look
    up (positions, distances of two tokens) need not lie in rows of the batch; and so are those that do more than look
    up and scale by an `embed_scale`."""
    for part in model.modules():
        try:
            found: Any = part.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        found = inner_module(found)  # of a layer of PEFT's that is about to be taken out
        if not isinstance(found, nn.Embedding) or found.max_norm is not None or not is_dense(found.weight):
            continue
        if type(found).forward is nn.Embedding.forward or hasattr(found, "embed_scale"):
            yield found


def inner_module(module: Any) -> Any:
    """The model's own module inside one of PEFT's, which may hold it several layers deep; else `module`."""
    while (inner := inside_peft(module)) is not None:
        module = inner
    return module


def inside_peft(module: nn.Module) -> nn.Module | None:
    """What a layer of PEFT's wraps; None of other modules, which may call one of theirs `base_layer` too."""
    if all(cls.__module__.partition(".")[0] != "peft" for cls in type(module).__mro__):
        return None
    return next((inner for name in _INNER if isinstance(inner := getattr(module, name, None), nn.Module)), None)


def is_packed_linear(module: nn.Module) -> bool:
    """Whether `module`, no `nn.Linear`, is a linear whose weight is packed in a form of its own, as GPTQ's, AWQ's and
    HQQ's are: `in_features` and `out_features`, no children, a matrix among its tensors, none that is a dense `weight`,
    and a forward that takes one tensor."""
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if any(type(width) is not int for width in widths) or any(True for _ in module.children()):
        return False
    if is_dense(getattr(module, "weight", None)) or not any(tensor.dim() >= 2 for tensor in tensors_of(module)):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) == 1 and required[0].kind is not inspect.Parameter.KEYWORD_ONLY
