"""`attach`: a `PeftModel` that stays one, whose LoRA layers mlora computes.

PEFT keeps its parameters, its saving and its switching; trainers that know PeftModels run as they are. Each of PEFT's
LoRA layers on a linear gets another `forward`, which runs base product and LoRA in one operator and keeps for the
backward pass what mlora's own training keeps: x once, and as many numbers a token as the adapter has rank rows
(`gradients/functions.py` has the formulas). What it does not compute goes through PEFT's own forward: DoRA and other
variants, embeddings, convolutions, several adapters in one batch, merged ones, and autocast to another dtype than the
base's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import errors, layout
from .ops import dispatch

_ALIGNMENT = 32  # elements, 64 bytes of 16-bit ones: where kernels like parts to begin
_PATCH = "_mlora_attached"  # of a layer: adapter's name -> `_Adapter`
_steps = 0  # of any optimizer: fused ones change parameters without counting a version


def attach(model: nn.Module) -> int:
    """Have mlora compute the LoRA layers of a `PeftModel`, or of a model with adapters in it, in place.

    The model stays what it is for everything else: its class, parameters, `state_dict`, `save_pretrained`,
    `set_adapter`, `disable_adapter`. `detach` undoes it. Gradients and results are PEFT's up to rounding; of a 16-bit
    base the adapter is rounded to the base's dtype for the product, while its parameters stay what they are.

    Args:
        model: with PEFT's layers, quantized bases included.

    Returns:
        How many layers mlora computes.

    Raises:
        PatchError: there is no LoRA layer on a linear, or it is attached already.
    """
    layers = _layers(model)
    if not layers:
        raise errors.PatchError(
            f"{type(model).__name__} has no LoRA layer of PEFT's on a linear; attach takes a PeftModel, and "
            f"mlora.patch any other model"
        )
    if any(_PATCH in layer.__dict__ for layer in layers):
        raise errors.PatchError("mlora is attached to this model already")
    _watch()
    for layer in layers:
        layer.__dict__[_PATCH] = {}
        layer.__dict__["forward"] = functools.partial(_forward, layer)
    return len(layers)


def detach(model: nn.Module) -> None:
    """Undo `attach`. Raises PatchError where it is not attached."""
    layers = [layer for layer in _layers(model) if _PATCH in layer.__dict__]
    if not layers:
        raise errors.PatchError(f"mlora is not attached to this {type(model).__name__}")
    for layer in layers:
        del layer.__dict__[_PATCH], layer.__dict__["forward"]


def _layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers on linears, quantized ones among them."""
    try:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
    except ImportError:
        return []
    other = (Embedding, MultiheadAttention, ParamWrapper, _ConvNd)
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer) and not isinstance(layer, other)]


class _Adapter:
    """One adapter of one layer as the kernels read it: A (rank, in), B (rank, out) and a shift (out,), if it has one,
    in a buffer of its own."""

    def __init__(self, a: nn.Linear, b: nn.Linear, like: Tensor, scale: float) -> None:
        rank, inputs, outputs = a.out_features, a.in_features, b.out_features
        sizes = [rank * inputs, rank * outputs, outputs if b.bias is not None else 0]
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.a, self.b, self.scale = a, b, scale
        self.arena = like.new_zeros(end)
        parts = [self.arena[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        self._a, self._b, self._shift = parts[0].view(rank, inputs), parts[1].view(rank, outputs), parts[2]
        row = [-1] * layout.TABLE_WIDTH
        row[layout.A], row[layout.B], row[layout.RANK] = starts[0], starts[1], rank
        row[layout.SCALE] = int(torch.tensor(scale).view(torch.int32)) & 0xFFFFFFFF
        if b.bias is not None:
            row[layout.SHIFT] = starts[2]
        turned = [-1] * layout.TABLE_WIDTH
        for to, source in layout.EXCHANGED.items():
            turned[to] = row[source]
        device = like.device
        self.table, self.exchanged = torch.tensor([row], device=device), torch.tensor([turned], device=device)
        one = int(torch.tensor(1.0).view(torch.int32))
        # One route, of one term, which is that of all rows; see `layout`.
        self.words = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, one], dtype=torch.int32, device=device)
        self._seen: tuple[int, ...] = ()

    def fits(self, a: nn.Linear, b: nn.Linear, like: Tensor, scale: float) -> bool:
        return (
            self.a is a
            and self.b is b
            and self.scale == scale
            and self.arena.dtype == like.dtype
            and self.arena.device == like.device
        )

    def refresh(self) -> None:
        """Read the parameters again, if they may have changed."""
        parameters = (self.a.weight, self.b.weight, *(() if self.b.bias is None else (self.b.bias,)))
        seen = (_steps, *(id(one) for one in parameters), *(one._version for one in parameters))
        if seen == self._seen:
            return
        with torch.no_grad():
            self._a.copy_(self.a.weight)
            self._b.copy_(self.b.weight.t())
            if self.b.bias is not None:
                self._shift.copy_(self.b.bias * self.scale)
        self._seen = seen

    def kept(self, x: Tensor) -> Tensor:
        """Room for v: s A x, (tokens, rank)."""
        tokens = x.numel() // x.shape[-1]
        return x.new_empty(tokens * self._a.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    own = type(layer).forward
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if (
        args
        or kwargs
        or not active
        or layer.disable_adapters
        or layer.merged
        or any(name in layer.lora_variant for name in active)
        or torch.compiler.is_compiling()
        or not isinstance(x, Tensor)
    ):
        out: Tensor = own(layer, x, *args, **kwargs)
        return out
    base = layer.base_layer
    if torch.is_autocast_enabled(x.device.type):
        wanted = torch.get_autocast_dtype(x.device.type)
        weight = getattr(base, "weight", None)
        if weight is None or weight.dtype != wanted:
            return own(layer, x)
        x = x.to(wanted)
    first, rest = active[0], active[1:]
    y = None
    if _is_plain(layer, base, first, x):
        adapter = _adapter(layer, first, x)
        kblock = _kblock(base, x)
        y = _Linear.apply(x, base.weight, base.bias, adapter, kblock, *_parameters(adapter))
    else:
        y, rest = base(x), active
    for name in rest:
        dropped = layer.lora_dropout[name](x).to(y.dtype)
        adapter = _adapter(layer, name, dropped)
        y = _Added.apply(y, dropped, adapter, *_parameters(adapter))
    return y


def _is_plain(layer: Any, base: nn.Module, name: str, x: Tensor) -> bool:
    """Whether base and LoRA read the same x, the base is a frozen matrix, and one operator does both."""
    if type(base) is not nn.Linear or base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return False
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    dropout = layer.lora_dropout[name]
    drops = layer.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1) > 0
    native = dispatch.backend(x.device, x.dtype) == "cpu"
    return native and frozen and not drops and x.dtype == base.weight.dtype


def _kblock(base: nn.Linear, x: Tensor) -> int:
    if not x.is_cpu or not x.is_contiguous() or not base.weight.is_contiguous():
        return dispatch.LIBRARY
    tokens = x.numel() // x.shape[-1]
    if torch.is_autocast_enabled("cpu"):
        return dispatch.LIBRARY
    return dispatch.probe_kblock(base.in_features, base.out_features, base.bias is not None, tokens, x.dtype)


def _adapter(layer: Any, name: str, x: Tensor) -> _Adapter:
    a, b, scale = layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name])
    kept = layer.__dict__[_PATCH]
    found = kept.get(name)
    if found is None or not found.fits(a, b, x, scale):
        found = kept[name] = _Adapter(a, b, x, scale)
    found.refresh()
    made: _Adapter = found
    return made


def _parameters(adapter: _Adapter) -> tuple[Tensor | None, ...]:
    return adapter.a.weight, adapter.b.weight, adapter.b.bias


class _Linear(torch.autograd.Function):
    """base(x) + s B^T (A x) of a frozen base that is its matrix and its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapter: _Adapter,
        kblock: int,
        a: Tensor,
        b: Tensor,
        shift: Tensor | None,
    ) -> Tensor:
        v = adapter.kept(x)
        y = dispatch.linear_keep(x, weight, bias, v, adapter.arena, adapter.table, adapter.words, kblock)
        ctx.adapter = adapter
        ctx.save_for_backward(x, v, weight, a, b, shift)  # a to shift for autograd to see that they are the same then
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        x, v, weight, *_ = ctx.saved_tensors
        h = h.contiguous()
        dx = h @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *_gradients(ctx.adapter, dx, x, v, h, ctx.needs_input_grad[5:])


class _Added(torch.autograd.Function):
    """y + s B^T (A x)."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, adapter: _Adapter, a: Tensor, b: Tensor, shift: Tensor | None
    ) -> Tensor:
        v, out = adapter.kept(x), y.clone()
        dispatch.apply_keep_(out, v, None, x, adapter.arena, adapter.table, adapter.words)
        ctx.adapter = adapter
        ctx.save_for_backward(x, v, a, b, shift)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor) -> tuple[Any, ...]:
        x, v, *_ = ctx.saved_tensors
        dense = h.contiguous()
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        return h, dx, None, *_gradients(ctx.adapter, dx, x, v, dense, ctx.needs_input_grad[3:])


def _gradients(
    adapter: _Adapter, dx: Tensor | None, x: Tensor, v: Tensor, h: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Add A^T (s B h) to `dx`, if that is wanted; the gradients of A, B and B's bias."""
    found: list[Tensor | None] = [None, None, None]
    if dx is None and not any(needed):
        return found
    adapter.refresh()
    turned = (adapter.arena, adapter.exchanged, adapter.words)
    big = torch.empty_like(v)
    dispatch.apply_keep_(torch.zeros_like(x) if dx is None else dx, big, None, h, *turned)
    at = torch.zeros(1, dtype=torch.int64, device=v.device)
    a, b, bias = _parameters(adapter)
    assert a is not None and b is not None
    if needed[0]:
        flat = torch.zeros(a.numel(), dtype=v.dtype, device=v.device)
        dispatch.rank_gradients_(flat, big, x, at, *turned)
        found[0] = flat.view_as(a).to(a.dtype)
    if needed[1]:
        flat = torch.zeros(b.numel(), dtype=v.dtype, device=v.device)
        dispatch.rank_gradients_(flat, v, h, at, adapter.arena, adapter.table, adapter.words)
        found[1] = flat.view(b.shape[1], b.shape[0]).t().to(b.dtype)
    if bias is not None and needed[2]:
        found[2] = (h.flatten(0, -2).to(v.dtype).sum(0) * adapter.scale).to(bias.dtype)
    return found


@functools.cache
def _watch() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(*_: Any) -> None:
    global _steps
    _steps += 1


__all__ = ["attach", "detach"]
