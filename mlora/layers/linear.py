"""The layer of a linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import errors
from ..ops import dispatch, reference
from ..ops.rows import check_rows
from ..routing import Plan, Siblings
from ..store import BOTH, GAIN, IN_GAIN
from .state import LayerState
from .swap import refuse_copy, refuse_move


class LoraLayer(nn.Module):
    """Mixed in before a linear's class; see the package's docstring."""

    _mlora: LayerState
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        if x is None:  # nn.Linear calls it `input`
            assert input is not None
            x = input
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            return self._compiled(x)
        plan = shared.local.plan or shared.default
        touches = plan.touches[state.index] if plan is not None else 0
        if touches:
            assert plan is not None
            self._check(x, plan)
            words = plan.tensor
        else:
            words = shared.blank
        if state.fused and not touches & IN_GAIN and (kblock := self._fusable(x)):
            return dispatch.linear(x, self.weight, self.bias, shared.arena, state.table, words, kblock)
        if not touches:
            return self._base(x)
        if plan is not None and shared.groups is not None and not torch.is_grad_enabled() and not x.is_inference():
            return self._grouped(x, plan, touches)
        return self._routed(x, words, touches)

    def _grouped(self, x: Tensor, plan: Plan, touches: int) -> Tensor:
        """`_routed`, but the first of several layers that read one input serves them all in one launch; the others
        find their results. An inference tensor, which does not tell whether it was written to in between, is not
        grouped."""
        state = self._mlora
        shared, seen = state.shared, state.shared.local.siblings
        groups = shared.groups
        assert groups is not None
        if seen is not None and seen.input is x and seen.version == x._version and seen.plan is plan:
            ready = seen.results.pop(state.index, None)
            if ready is None:
                known = groups.get(seen.first, ())
                if len(known) < dispatch.GROUP - 1 and self not in known and state.index != seen.first:
                    groups[seen.first] = (*known, self)
                return self._routed(x, plan.tensor, touches)
            return ready
        if seen is not None and seen.results:  # not called after all: not siblings
            left = groups.get(seen.first, ())
            groups[seen.first] = tuple(layer for layer in left if layer._mlora.index not in seen.results)
        seen = shared.local.siblings = Siblings(x, x._version, plan, state.index, {})
        others = [
            layer
            for layer in groups.get(state.index, ())
            if plan.touches[layer._mlora.index]
            and not (plan.touches[layer._mlora.index] | touches) & IN_GAIN
            and layer._mlora.outer is None
            and "forward" not in layer.__dict__
        ]
        if not others:
            return self._routed(x, plan.tensor, touches)
        layers = [self, *others]
        outputs = [layer._base(x) for layer in layers]
        dispatch.apply_group_(outputs, x, shared.arena, [layer._mlora.table for layer in layers], plan.tensor)
        for layer, output in zip(others, outputs[1:], strict=True):
            seen.results[layer._mlora.index] = output
        return outputs[0]

    def _base(self, x: Tensor) -> Tensor:
        outer = self._mlora.outer
        return super().forward(x) if outer is None else outer(x)

    def _fusable(self, x: Tensor) -> int:
        """The block with which the fused op may serve `x`, or 0."""
        tokens = x.numel() // x.shape[-1]
        if not 0 < tokens <= dispatch.FUSED_MAX_TOKENS or x.dtype is not torch.bfloat16:
            return 0
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return 0
        if torch.is_autocast_enabled("cpu"):  # the library would compute in autocast's dtype
            return 0
        return self._mlora.kblock(self, tokens)

    def _routed(self, x: Tensor, words: Tensor, touches: int) -> Tensor:
        """The base, then one op. With input gains the base reads u * x, and a row that also takes an output gain from
        another adapter needs base(x) beside it: deltas add without a cross term."""
        state = self._mlora
        arena, table = state.shared.arena, state.table
        source = None
        if touches & IN_GAIN:
            if touches & BOTH:
                source = self._base(x)
            y = self._base(dispatch.scale_input(x, arena, table, words))
        else:
            y = self._base(x)
        if y.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
            return reference.apply(y, source, x, arena, table, words)
        dispatch.apply_(y, source, x, arena, table, words)
        return y

    def _compiled(self, x: Tensor) -> Tensor:
        """What a compiled graph runs: always the same ops, whose inputs only change their contents."""
        state = self._mlora
        shared = state.shared
        self._check_autocast(x)
        if state.gathered:
            check_rows(shared.plan, 0)  # only one entry for all rows may pass
        touches = IN_GAIN | BOTH if shared.in_gains else GAIN
        return self._routed(x, shared.plan, touches)

    def _check(self, x: Tensor, plan: Plan) -> None:
        state = self._mlora
        self._check_autocast(x)
        if x.dtype != state.dtype or x.device != state.device:
            raise errors.ModelMovedError(
                f"{state.name} got an input in {x.dtype} on {x.device}; the model was patched in {state.dtype} on "
                f"{state.device}. Unpatch, move the model and patch again"
            )
        self._check_rows(x, plan)

    def _check_rows(self, x: Tensor, plan: Plan) -> None:
        state = self._mlora
        if plan.uniform:
            return
        rows = x.shape[0] if x.dim() > 1 else 1
        if not state.gathered:
            if rows in plan.row_counts:
                return
            length = state.shared.local.length
            if x.dim() == 2 and length and any(rows == count * length for count in plan.row_counts):
                return  # (rows, length, in) flattened in order
        what = "an expert, which gets tokens gathered from any rows" if state.gathered else "the module"
        raise errors.AttributionError(
            f"{state.name} got an input of shape {tuple(x.shape)}, which cannot be attributed to the batch's "
            f"{plan.rows} rows ({what}); use one adapter for all rows, or adapters that do not target it"
        )

    def _check_autocast(self, x: Tensor) -> None:
        if torch.is_autocast_enabled(x.device.type):
            state = self._mlora
            raise errors.ModelMovedError(
                f"{state.name} runs under autocast to {torch.get_autocast_dtype(x.device.type)}; the model was patched "
                f"in {state.dtype}. Leave autocast, or unpatch the model, convert it, and patch it again"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_move(self, fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()
