"""Norms: which modules are some, and their layer."""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..arena.bits import TAIL
from ..gradients import norms
from ..ops import dispatch, reference
from ..plan.packing import Packing
from ..plan.plan import Plan
from .dense import is_dense
from .linear import LoraLayer
from .pointwise import normalized
from .swap import twin_of
from .trained import refuse_beside, refuse_training


def norm_offset(module: nn.Module) -> float | None:
    """k where `module` gives n * (weight + k) + bias over its input's last dimension, whatever n is; None if it is
    nothing of that kind.

    Found by its interface (a 1-D `weight`, no children, a forward of one tensor) and by what its own forward makes of
    random numbers under other weights, so that a norm is one by what it does and not by its class.
    """
    if not is_norm_like(module):
        return None
    weight = cast(Tensor, module.weight)
    width, device = len(weight), torch.device("cpu") if weight.is_meta else weight.device
    draw = torch.Generator().manual_seed(0)
    x, first, second, bias = (
        (torch.rand(shape, generator=draw) + 0.5).to(device)
        for shape in ((2, 2 if width == 3 else 3, width), (width,), (width,), (width,))
    )
    x = x * torch.arange(1, width + 1, device=device).sin()  # of both signs
    twin, cls = twin_of(module)

    def output(weight: Tensor, bias: Tensor) -> Tensor:
        held = {"weight": weight, "bias": bias} if has_bias else {"weight": weight}
        twin.__dict__["_parameters"] = {**module.__dict__["_parameters"], **held}
        return cast(Tensor, cls.forward(twin, x))

    has_bias = isinstance(getattr(module, "bias", None), Tensor)
    none = torch.zeros_like(bias)
    try:
        with torch.no_grad():
            one = output(first, none)
            if not isinstance(one, Tensor) or one.shape != x.shape:
                return None
            offset = next((k for k in (0.0, 1.0) if not output(torch.full_like(first, -k), none).any()), None)
            if offset is None:
                return None
            two, shifted = output(second, none), output(first, bias)
    except Exception:  # a forward that does not take such an input is not a norm's
        return None
    added = bias if has_bias else none
    fits = torch.allclose(two, one * ((second + offset) / (first + offset)), rtol=1e-5, atol=1e-5)
    return offset if fits and torch.allclose(shifted, one + added, rtol=1e-5, atol=1e-5) else None


def is_norm_like(module: nn.Module) -> bool:
    """Whether `module` has a norm's interface."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not is_dense(weight) or cast(Tensor, weight).dim() != 1 or any(True for _ in module.children()):
        return False
    if bias is not None and (not is_dense(bias) or bias.shape != cast(Tensor, weight).shape):
        return False
    own: Any = type(module).__bases__[1] if isinstance(module, LoraLayer) else type(module)
    return len(inspect.signature(own.forward).parameters) == 2  # self and one tensor, whatever its name


class NormLayer(LoraLayer):
    """Mixed in before a norm's class: a gain and a shift of what it gives."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:  # type: ignore[override]
        state = self._mlora
        shared = state.shared
        if not shared.norms and state.outer is None:  # models have many norms, and few adapters change any
            return cast(Tensor, self._whole(*args, **named))
        (x,) = (*args, *named.values())
        if torch.compiler.is_compiling():
            if not shared.norms:
                return self._base(x)
            self._check_autocast(x)
            if shared.training is not None and torch.is_grad_enabled():
                refuse_training(state.name)
            self._check_compiled(x)
            return self._added(self._base(x), x, state.words)
        scope = shared.active.get()
        plan = scope.plan or shared.default
        if shared.recorded and torch.is_grad_enabled():
            scope.check_told(state.name)
        if plan is None or not (touches := plan.touches[state.index]):
            return self._base(x)
        self._check_autocast(x)
        if touches & TAIL and isinstance(scope.tokens, Packing):
            plan, axis = scope.tokens.attribute(x, state.name)
            if math.prod(x.shape[:axis]) != 1:  # (1, heads, tokens, width)
                return self._behind(x, axis, plan)
        elif touches & TAIL:
            plan = self._by_token(x, scope)
        self._check_rows(x, plan)
        return self._planned(self._base(x), x, plan)

    def _whole(self, *args: Any, **named: Any) -> Any:
        held: Any = self._parameters
        if self._mlora.eps and len(args) == 1 and "weight" in held:
            y = normalized(args[0], held["weight"], self._mlora.own.__dict__[self._mlora.eps])
            if y is not None:
                return y
        return super()._whole(*args, **named)

    def _behind(self, x: Tensor, axis: int, plan: Plan) -> Tensor:
        """What the plan's rows, of which there is one for each index of that dimension, make of x."""
        y, front = self._base(x).movedim(axis, 0), x.movedim(axis, 0)
        return self._planned(y.contiguous(), front.contiguous(), plan).movedim(0, axis)

    def _normalized(self, x: Tensor, offset: float) -> Tensor:
        """n, of n (w + k) + b."""
        twin, cls = twin_of(self)
        held: Any = self._mlora.own._parameters
        plain = {"weight": torch.full_like(held["weight"], 1 - offset)}
        if held.get("bias") is not None:
            plain["bias"] = torch.zeros_like(held["bias"])
        twin.__dict__["_parameters"] = {**held, **plain}
        return cast(Tensor, cls.forward(twin, x))

    def _planned(self, y: Tensor, x: Tensor, plan: Plan) -> Tensor:
        state, shared = self._mlora, self._mlora.shared
        if shared.training is not None and torch.is_grad_enabled():
            site = shared.training.site(plan, state.index)
            if site is not None and site.trains:
                if plan.touches[state.index] & TAIL and not plan.by_token:
                    refuse_beside(state.name)
                return norms.change(y, x, self._normalized, site)
        return self._added(y, x, plan.tensors[state.home])

    def _added(self, y: Tensor, x: Tensor, words: Tensor) -> Tensor:
        state = self._mlora
        if y.requires_grad:
            return reference.apply(y, None, x, state.arena, state.table, words)
        dispatch.apply_(y, None, x, state.arena, state.table, words)
        return y
