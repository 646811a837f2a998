"""What models compute between their linears, on the CPU in one pass each, where that gives the very bits.

An RMS norm is eight operators of torch, a rotary embedding of queries and keys fourteen, a gated MLP's activation two.
In a decode step their calls take longer than their work; with many tokens each of them goes through memory. Kernels
(csrc/cpu/pointwise.h) do each in one pass, with torch's roundings and order of sums. Code of models is known by what it
computes, never by its name alone: it is tried on random numbers, activations on all numbers of 16 bits, and what
differs in a bit is left to the model. So is all that is compiled, recorded by autograd, or seen by a mode or profiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import direct
from .attention import INTERFACE, Interface
from .swap import twin_of

_EPS = ("variance_epsilon", "eps")
_ROTARY = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "act_fn", "down_proj")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_norms: dict[tuple[type, int, torch.dtype], str] = {}
_gates: dict[tuple[type, type], bool] = {}


def eps_of(module: nn.Module) -> str:
    """The attribute that holds the epsilon of an RMS norm whose bits `normalized` gives; "" of any other module."""
    weight: Any = module._parameters.get("weight")
    name = next((name for name in _EPS if isinstance(module.__dict__.get(name), float)), "")
    if not direct.READY or not name or type(weight) is not nn.Parameter or weight.dim() != 1 or weight.is_meta:
        return ""
    key = type(module), len(weight), weight.dtype
    if key not in _norms:
        _norms[key] = name if weight.dtype in _DTYPES and _is_rms_norm(module, weight, getattr(module, name)) else ""
    return _norms[key]


def _is_rms_norm(module: nn.Module, weight: Tensor, eps: float) -> bool:
    draw = torch.Generator().manual_seed(0)
    twin, cls = twin_of(module)
    other = torch.randn(weight.shape, generator=draw).to(weight.dtype)
    twin.__dict__["_parameters"] = {**module._parameters, "weight": other}
    for rows, scale in ((1, 1.0), (3, 30.0), (40, 0.01)):
        x = (torch.randn(rows, len(weight), generator=draw) * scale).to(weight.dtype)
        try:
            with torch.no_grad():
                wanted = cls.forward(twin, x)
        except Exception:  # a forward that does not take such an input is not a norm's
            return False
        given = torch.empty_like(x)
        if not direct.rms_norm(given, x, other, eps) or not _equal(given, wanted):
            return False
    return True


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """weight * (x / rms(x)) over the last dimension of x, (..., width), rounded to x's dtype after each of the two
    products; None where it is left to the module."""
    if not direct.usable(x, weight):
        return None
    y = torch.empty_like(x)
    return y if direct.rms_norm(y, x, weight, eps) else None


def with_kernels(forward: Callable[..., Any], attention: bool = False) -> Callable[..., Any] | None:
    """`forward` of an attention as it is, but for what it calls: the rotary embedding, `apply_rotary_pos_emb`, and with
    `attention` what transformers' interface chooses (layers/attention.py). None if it calls nothing that is known. It
    is the model's own function with names of its own before its module's, and what else uses that module sees nothing
    of it."""
    inner = getattr(forward, "__wrapped__", None)
    if inner is not None:  # decorated: the decorator's function over another inside
        copied, cells = with_kernels(inner, attention), getattr(forward, "__closure__", None) or ()
        if copied is None or not any(_holds(cell, inner) for cell in cells):
            return None
        closure = tuple(CellType(copied) if _holds(cell, inner) else cell for cell in cells)
        return _copy(cast(FunctionType, forward), cast(FunctionType, forward).__globals__, closure)
    if not isinstance(forward, FunctionType):
        return None
    names, used = forward.__globals__, forward.__code__.co_names
    replaced: dict[str, Any] = {}
    original = names.get(_ROTARY)
    if _ROTARY in used and isinstance(original, FunctionType) and any(_rotates(original, dtype) for dtype in _DTYPES):
        replaced[_ROTARY] = _rotation(original, names)
    if attention and INTERFACE in used and INTERFACE in names:
        replaced[INTERFACE] = Interface(names)
    return _copy(forward, _Names(names, replaced), forward.__closure__) if replaced else None


class _Names(dict[str, Any]):
    """A module's names as they are when they are asked for, behind others."""

    def __init__(self, names: Mapping[str, Any], replaced: Mapping[str, Any]) -> None:
        super().__init__(replaced)
        self._names = names

    def __missing__(self, name: str) -> Any:
        return self._names[name]


def _copy(forward: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, closure)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _holds(cell: CellType, what: Any) -> bool:
    try:
        return cell.cell_contents is what
    except ValueError:  # an empty one
        return False


def _rotation(original: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """In place of `original` in code whose names are `names`."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        current = names[_ROTARY]  # which somebody may have replaced
        known = current is original and not args and not kwargs
        if known and direct.usable(q, k, cos, sin) and _rotates(original, q.dtype):
            turned = torch.empty_like(q), torch.empty_like(k)
            if all(direct.rotate(y, x, cos, sin) for y, x in zip(turned, (q, k), strict=True)):
                return turned
        return current(q, k, cos, sin, *args, **kwargs)

    return rotate


@functools.cache
def _rotates(function: Callable[..., Any], dtype: torch.dtype) -> bool:
    """Whether it turns queries and keys, (batch, heads, tokens, dim), by halves, as `direct.rotate` does."""
    if not direct.READY or dtype not in _DTYPES:
        return False
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 72, generator=draw).to(dtype).transpose(1, 2) for heads in (3, 1))
    cos, sin = (torch.randn(2, 5, 72, generator=draw).to(dtype) for _ in range(2))
    try:
        with torch.no_grad():
            wanted = function(q, k, cos, sin)
        given = torch.empty_like(q), torch.empty_like(k)
        done = all(direct.rotate(y, x, cos, sin) for y, x in zip(given, (q, k), strict=True))
        return done and all(_equal(a, b) for a, b in zip(given, wanted, strict=True))
    except Exception:  # it takes something else
        return False


def is_gated(module: nn.Module) -> bool:
    """Whether a call is down_proj(act_fn(gate_proj(x)) * up_proj(x)), with SiLU as the activation."""
    if not direct.READY or {*module._modules} != {*_GATED} or "forward" in module.__dict__:
        return False
    act = module._modules["act_fn"]
    key = type(module), type(act)
    if key not in _gates:
        _gates[key] = _gates_by_silu(module)
    return _gates[key]


def _gates_by_silu(module: nn.Module) -> bool:
    twin, cls = twin_of(module)
    for dtype in (torch.float16, torch.bfloat16):
        gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        up = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = torch.zeros(2, dtype=dtype)
        twin.__dict__["_modules"] = {
            "gate_proj": lambda given, gate=gate, x=x: gate if given is x else None,
            "up_proj": lambda given, up=up, x=x: up if given is x else None,
            "act_fn": module._modules["act_fn"],
            "down_proj": lambda given: (given,),
        }
        try:
            with torch.no_grad():
                (wanted,) = cls.forward(twin, x)
        except Exception:  # its forward is another one
            return False
        given = torch.empty_like(gate)
        if not direct.gate(given, gate, up) or not _equal(given, wanted):
            return False
    return True


def gated(cls: Any) -> Callable[..., Any]:
    """The forward of an MLP for which `is_gated` holds."""
    own = cls.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        act: Any = self._modules["act_fn"]
        seen = act._forward_hooks or act._forward_pre_hooks or "forward" in act.__dict__
        if len(args) != 1 or kwargs or seen or not direct.usable(args[0]) or torch.is_grad_enabled():
            return own(self, *args, **kwargs)
        held: Any = self._modules
        gate, up = held["gate_proj"](args[0]), held["up_proj"](args[0])
        y = torch.empty_like(gate)
        if not direct.gate(y, gate, up):
            y = act(gate) * up
        return held["down_proj"](y)

    return forward


def _equal(one: Tensor, other: Any) -> bool:
    """The same numbers in the same dtype; what is no number in both is equal."""
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype is not other.dtype:
        return False
    same = (one == other) & (one.signbit() == other.signbit())
    return bool((same | (one.isnan() & other.isnan())).all())
