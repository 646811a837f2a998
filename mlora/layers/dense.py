"""Which tensors are plain weights, and in which dtype a module works."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_TORCH = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
DENSE = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def is_dense(weight: Any) -> bool:
    """Whether `weight` is a plain floating-point tensor, or split over processes and this one's part is: no subclass,
    which may be quantized, and no 8-bit float, whose scale is kept elsewhere."""
    return type(own_part(weight)) in (Tensor, nn.Parameter) and weight.dtype in DENSE


def is_split(tensor: Any) -> bool:
    """Whether it is a tensor of several processes, a `DTensor`, of which this one has a part."""
    if type(tensor) in (Tensor, nn.Parameter) or not isinstance(tensor, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # imported, if one was made
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Any) -> Any:
    """What this process has of a split tensor; any other as it is."""
    return tensor._local_tensor if is_split(tensor) else tensor


def is_cast(module: nn.Module) -> bool:
    """Whether the weight rests in an 8-bit float, which the module, of a class of torch's own, does not multiply in: a
    hook casts it around each call, as diffusers' layerwise casting does."""
    weight: Any = getattr(module, "weight", None)
    eight = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype not in DENSE
    return eight and any(type(module).forward is kind.forward for kind in _TORCH)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The module's own parameters and buffers."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def model_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point dtype that most of the model's parameters are in; torch's default if there is none."""
    found = Counter(p.dtype for p in model.parameters() if p.dtype in DENSE)
    return found.most_common(1)[0][0] if found else torch.get_default_dtype()


def compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the activations that `module` works on: its weight's or its bias's, and `default`, the model's,
    where the weight is packed and there is no bias."""
    for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
        if isinstance(tensor, Tensor) and tensor.dtype in DENSE:
            return tensor.dtype
    return default
