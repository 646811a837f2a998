"""Reads of a layer's parameters by code that does not call the layer.

What a plan does to a module is done where the module is called. Code that takes its `weight` or `bias` and computes
with it, as fused kernels and `F.linear(x, self.proj.weight)` do, gets the base's for all rows. So while a call of the
model runs, whoever asks a layer for a parameter that the plan changes gets it as a `Read`: its dtype, its shape and
what else is no value are told, and whatever takes its values is refused. Layers read their own past that, so nothing is
looked at before somebody else reads, and a step costs nothing more.

A read of a bias counts where the plan changes what is added, and one of a token embedding where the embedding itself
was trained: PEFT's LoRA around one shows the base's to a head that reads it. Not seen are parameters that are taken out
of `_parameters`, as `named_parameters` does, and reads outside of a call of the model.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..arena.bits import GAIN, HEAD, INPUT, LORA, SHIFT, TURN
from ..ops.checks import check_reads, refuse_read
from .dense import is_split, own_part
from .placed import BRINGS, brings_all

if TYPE_CHECKING:
    from .state import LayerState

_BITS = {"weight": LORA | GAIN | INPUT | TURN | HEAD, "bias": GAIN | SHIFT | TURN | HEAD}

# What tells nothing of a tensor's values, or takes the kind of one for another.
_TOLD = frozenset((
    "__format__", "__len__", "__repr__", "can_cast", "dim", "element_size", "empty_like", "full_like", "get_device",
    "is_complex", "is_contiguous", "is_floating_point", "is_signed", "ndimension", "nelement", "new_empty", "new_full",
    "new_ones", "new_tensor", "new_zeros", "numel", "ones_like", "promote_types", "rand_like", "randn_like",
    "result_type", "size", "storage_offset", "stride", "zeros_like",
))  # fmt: skip
_REWRITES = frozenset(name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__"))  # as rwkv does
_LIKE = frozenset(("expand_as", "reshape_as", "to", "type_as", "view_as"))  # of another tensor, which comes first
_VALUES = frozenset(("H", "T", "data", "grad", "imag", "mH", "mT", "real"))  # the attributes that are tensors


class Read(Tensor):
    """A layer's parameter, in the very same memory, as it is given to who reads it; see the module's docstring."""

    _layer: nn.Module
    _name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _tells(func, args):
            for read in [value for value in tree_leaves((args, kwargs)) if isinstance(value, Read)]:
                _check(read)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return _read(args[0]._layer, args[0]._name, result) if _is_same(func) and isinstance(args[0], Read) else result


def shown(layer: nn.Module, state: LayerState, name: str, tensor: Tensor) -> Tensor:
    """What who reads the layer's parameter `name` gets of it."""
    if not torch.compiler.is_compiling() and not _changed(state, name):
        return tensor
    if is_split(tensor) and _runs(layer):  # by what transformers does around it, on tensors of all processes
        return tensor
    return _read(layer, name, tensor)


def _read(layer: nn.Module, name: str, tensor: Tensor) -> Tensor:
    read = own_part(tensor).as_subclass(Read)
    read._layer, read._name = layer, name
    return read


def _changed(state: LayerState, name: str) -> bool:
    """Whether a call of the model runs under a plan that changes what reads of the parameter should give."""
    scope = state.shared.active.get()
    plan = scope.plan or state.shared.default
    if plan is None or scope.late is None:
        return False
    numbers = state.numbers_of(name)
    if not any(plan.touches[index] & _BITS.get(name, LORA) for index in numbers):
        return False
    return not state.embeds or any(index in plan.trained for index in numbers)


def _tells(func: Any, args: Any) -> bool:
    """Whether the result says nothing of the values of what was read."""
    name = func.__name__
    if name == "__get__":
        return func.__self__.__name__ not in _VALUES or _is_same(func)
    if name in _REWRITES:
        return not any(isinstance(value, Read) for value in args[1:])
    return name in _TOLD or _is_same(func) or (name in _LIKE and not isinstance(args[0], Read))


def _is_same(func: Any) -> bool:
    """Whether the result is what was read, by another name."""
    return func.__name__ == "detach" or (func.__name__ == "__get__" and func.__self__.__name__ == "data")


def _check(read: Read) -> None:
    layer: Any = read._layer
    state, name = layer._mlora, read._name
    if torch.compiler.is_compiling():
        for index in state.numbers_of(name):
            check_reads(state.shared.header, state.shared.number, index, _BITS.get(name, LORA), f"{state.name}.{name}")
    elif _changed(state, name) and not _runs(layer):
        names = (state.shared.active.get().plan or state.shared.default).names
        refuse_read(f"{state.name}.{name}", f"one of the adapters {', '.join(map(repr, names))}")


def _runs(layer: nn.Module) -> bool:
    """Whether the layer is being called in this thread, so that its own hooks read it; or a hook of a module around it
    brings or takes away what is inside."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CALLS and frame.f_locals.get("self") is layer:
            return True
        if frame.f_code.co_name in BRINGS and brings_all(frame.f_locals.get("self")):
            return True
        frame = frame.f_back
    return False


_CALLS = (nn.Module._call_impl.__code__,)
