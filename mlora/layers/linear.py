"""The layer of a linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import errors
from ..arena.bits import BOTH, DROP, GAIN, HEAD, INPUT, LORA, SHIFT, TAIL, TURN
from ..gradients.recorded import Site
from ..ops import direct, dispatch, reference
from ..ops.checks import check_foreign, check_front, check_heads, check_rows, check_tails
from ..plan.plan import Plan
from ..plan.scope import Scope, Siblings
from .cuts import check_local, refuse_compiled
from .dense import DENSE
from .head import answer
from .reads import shown
from .state import LayerState
from .swap import refuse_copy, refuse_move
from .trained import refuse_training, trained

_APART = INPUT | TURN | HEAD | DROP  # what takes more than the base and a delta of its input


class LoraLayer(nn.Module):
    """Mixed in before a linear's class; see the package's docstring."""

    _mlora: LayerState
    weight: Tensor
    bias: Tensor | None
    out_features: int

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__["_parameters"].get(name)
        return super().__getattr__(name) if held is None else shown(self, self.__dict__["_mlora"], name, held)

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        if x is None:  # nn.Linear calls it `input`
            assert input is not None
            x = input
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            return self._compiled(x)
        scope = shared.active.get()
        plan = scope.plan or shared.default
        touches = 0 if plan is None else plan.touches[state.index]
        if plan is not None and touches & TAIL:
            plan = self._by_token(x, scope)
        # What follows runs for each linear and token, among code that leaves little of it in the caches: few calls, and
        # none of nn.Module's __getattr__.
        held: Any = self._parameters
        plain = state.plain and "weight" in held and "bias" in held  # and nobody has parametrized them since
        recorded = direct.in_forward_mode() or (torch.is_grad_enabled() and self._recorded(x))
        if not plain or touches & _APART or recorded:
            if shared.recorded and torch.is_grad_enabled():
                scope.check_told(state.name)
            return self._apart(x, plan, touches, plain) if plan is not None and touches else self._base(x)
        if plan is None or not touches:
            plan = shared.blank
        else:
            shape = x.shape
            if x.dtype is not state.dtype or not x.is_cpu:
                return self._apart(x, plan, touches)
            if plan.entries != 1 and (shape[0] not in plan.row_counts or len(shape) == 1 or state.loose):
                self._check_rows(x, plan)
        weight, bias = held["weight"], held["bias"]
        past = scope.unobserved and state.direct is not None and type(x) is Tensor  # the dispatcher
        if state.fused and (kblock := state.kblock(x)):
            if past:
                y = x.new_empty((*x.shape[:-1], state.shape[0]))
                if direct.linear(state.direct, plan.raw, y, x, weight, bias, kblock):
                    return y
            if touches:
                self._check_weight(weight)
            if weight.is_contiguous():  # or somebody has replaced it since
                return dispatch.linear(x, weight, bias, state.arena, state.table, plan.tensors[state.home], kblock)
        y = F.linear(x, weight, bias)
        if touches and not (past and direct.apply(state.direct, plan.raw, y, x)):
            if y.dtype is not x.dtype:
                self._check_autocast(x)
            self._check_weight(weight)
            dispatch.apply_native_(y, None, x, state.arena, state.table, plan.tensors[state.home])
        return y

    def _apart(self, x: Tensor, plan: Plan, touches: int, plain: bool = False) -> Tensor:
        """The base by the module's own forward, then the delta."""
        state = self._mlora
        shared = state.shared
        self._check(x, plan)
        if shared.training is not None and (touches & DROP or torch.is_grad_enabled()):
            site = shared.training.site(plan, state.index)
            touches &= ~TAIL if plan.by_token else ~0
            if site is not None and (site.trains or not touches & (HEAD | TAIL)):
                return self._trained(x, site, touches, plain and not touches & (_APART ^ DROP))
        words = plan.tensors[state.home]
        if touches & HEAD:
            base = partial(self._routed, words=words, touches=touches)
            return answer(x, plan.heads[state.index], state.arena, base, self.out_features)
        apart = touches & (INPUT | TURN)
        if shared.groups is not None and not apart and not torch.is_grad_enabled() and not x.is_inference():
            return self._with_siblings(x, plan)
        return self._routed(x, words, touches)

    def _trained(self, x: Tensor, site: Site, touches: int, plain: bool) -> Tensor:
        return trained(self, x, site, touches, plain)

    def _by_token(self, x: Tensor, scope: Scope) -> Plan:
        """The plan of what is done to x's tokens, where it is not the same for all of a row's."""
        state = self._mlora
        if scope.tokens is None:
            raise errors.AttributionError(
                f"{state.name} runs outside of a call of the patched model, so that it cannot be told which tokens its "
                f"input is of, as packed sequences and aLoRAs need; call the model itself"
            )
        return scope.tokens.plan_of(x, state.name, state.gathered or state.foreign or state.order.exchanged)

    def _with_siblings(self, x: Tensor, plan: Plan) -> Tensor:
        """`_routed`, and in the same call what the layers that read `x` after this one will return. Not for inference
        tensors, which do not tell whether they were written to in between."""
        state = self._mlora
        shared, index, seen = state.shared, state.index, state.shared.active.get().siblings
        words = plan.tensors[state.home]
        if seen is not None and seen.input is x and seen.plan is plan:
            ready = seen.results.pop(index, None)
            if ready is not None and seen.version == x._version:
                return ready
        groups = shared.groups
        assert groups is not None
        if seen is not None:
            known = groups.get(seen.first, ())
            if seen.first != index and seen.input is x and seen.version == x._version:  # read by that one too
                if self not in known and len(known) < dispatch.GROUP - 1:
                    groups[seen.first] = (*known, self)
                return self._routed(x, words, plan.touches[index])
            if seen.results:  # not asked for: their layers do not read what that one reads
                groups[seen.first] = tuple(layer for layer in known if layer._mlora.index not in seen.results)
        y = self._given(x)
        outputs, tables = [y], [state.table]
        results: dict[int, Tensor] = {}
        for layer in groups.get(index, ()):
            its = layer._mlora
            touches = plan.touches[its.index]
            if touches and not touches & (INPUT | TURN | HEAD) and not its.gathered and its.outer is None:
                if "forward" in layer.__dict__:  # somebody's, set since
                    continue
                if (touches ^ plan.touches[index]) & TAIL:  # it reads another plan
                    continue
                results[its.index] = output = layer._given(x)
                outputs.append(output)
                tables.append(its.table)
        shared.active.get().siblings = Siblings(index, x, plan, results)
        if results:
            dispatch.apply_group_(outputs, x, state.arena, tables, words)
        else:
            dispatch.apply_(y, None, x, state.arena, state.table, words)
        return y

    def _base(self, x: Tensor) -> Tensor:
        outer = self._mlora.outer
        return self._whole(x) if outer is None else outer(x)

    def _given(self, x: Tensor) -> Tensor:
        """The base's output, to which a delta is added."""
        y = self._base(x)
        self._check_given(y, x)
        return y

    def _check_given(self, y: Any, x: Tensor) -> None:
        cut = self._mlora.cut
        width = self.nf if isinstance(self, Conv1D) else self.out_features
        if cut is not None and cut.axis == "outputs":
            width = cut.width
        if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], width):
            seen = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise errors.UnsupportedAdapterError(
                f"{self._mlora.name} ({type(self).__name__}) gives {seen} for an input of shape {tuple(x.shape)}, "
                f"which is no linear's output; use adapters that do not target it"
            )

    def _whole(self, *args: Any, **named: Any) -> Any:
        """The module's own forward, which reads its parameters as the base does."""
        own: Any = self._mlora.own
        return type(own).forward(self if "parametrizations" in self._modules else own, *args, **named)

    def _recorded(self, x: Tensor) -> bool:
        """Whether autograd, if it is on, would record the base or an adapter. What is split over processes says so."""
        if self._mlora.shared.training is not None or self._mlora.cut is not None:
            return True
        return x.requires_grad or any(tensor.requires_grad for tensor in self.parameters(recurse=False))

    def _routed(self, x: Tensor, words: Tensor, touches: int) -> Tensor:
        """The base, then one op."""
        arena, table = self._mlora.arena, self._mlora.table
        y, source = self._bases(x, words, touches)
        if not touches & (LORA | GAIN | SHIFT):  # nothing is added to what the base gave, turned or not
            return y
        if y.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
            return reference.apply(y, source, x, arena, table, words)
        dispatch.apply_(y, source, x, arena, table, words)
        return y

    def _bases(
        self, x: Tensor, words: Tensor, touches: int, scale: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The base's output, and base(x) where gains read that and it is something else. With input gains or turns the
        base reads U x, which `scale` makes, and where a row also takes an output gain or turn from another adapter
        base(x) is wanted beside it: deltas add without a cross term."""
        source = None
        if touches & INPUT:
            source = self._given(x) if touches & BOTH else None
            y = self._given(self._scaled(x, words) if scale is None else scale(x))
        else:
            y = self._given(x)
        if not touches & TURN:
            return y, source
        return self._turned(y, source, words), y if source is None else source

    def _scaled(self, x: Tensor, words: Tensor) -> Tensor:
        """U x."""
        state = self._mlora
        recorded = x.requires_grad and torch.is_grad_enabled()
        scale = reference.scale_input if recorded else dispatch.scale_input
        return scale(x, state.arena, state.table, words)

    def _turned(self, y: Tensor, base: Tensor | None, words: Tensor) -> Tensor:
        """y with the output turns of `base`, or of y."""
        state = self._mlora
        turn = reference.turn_output if y.requires_grad else dispatch.turn_output
        return turn(y, base, state.arena, state.table, words)

    def _compiled(self, x: Tensor) -> Tensor:
        """What a compiled graph runs: always the same ops, whose inputs only change their contents."""
        state = self._mlora
        shared = state.shared
        self._check_autocast(x)
        if state.cut is not None:
            refuse_compiled(state.name)
        if shared.training is not None and torch.is_grad_enabled():
            refuse_training(state.name)
        self._check_compiled(x)
        if state.index in shared.heads:
            check_heads(shared.header)
        if state.index in shared.tails:
            check_tails(shared.header)
        if shared.inputs or shared.turns:
            touches = (LORA | INPUT | BOTH if shared.inputs else LORA | GAIN) | (TURN if shared.turns else 0)
            return self._routed(x, state.words, touches)
        if state.plain and not (torch.is_grad_enabled() and self._recorded(x)):
            probed = dispatch.FASTEST if shared.fused == "always" else dispatch.PROBED
            kblock = probed if state.fused else dispatch.LIBRARY
            held: Any = self._parameters
            return dispatch.linear(x, held["weight"], held["bias"], state.arena, state.table, state.words, kblock)
        return self._routed(x, state.words, LORA | GAIN)

    def _check_compiled(self, x: Tensor) -> None:
        """`_check_rows`, when the compiled code runs."""
        state, inner = self._mlora, _inner(x)
        shared = state.shared
        if state.gathered or (state.order.exchanged and not inner):
            check_rows(state.words, 0 if state.gathered else x.shape[0])  # of 0 rows: only one entry for all may pass
        elif state.order.exchanged:
            check_front(state.words, x.shape[0], inner)
        if state.foreign:
            check_foreign(shared.header)

    def _check(self, x: Tensor, plan: Plan) -> None:
        state = self._mlora
        if state.cut is not None:
            check_local(x, state.name)
        if torch.is_autocast_enabled(state.device_type):
            self._check_autocast(x)
        if (x.dtype is not state.dtype and not self._is_cast(x.dtype)) or x.device != state.device:
            raise errors.ModelMovedError(
                f"{state.name} got an input in {x.dtype} on {x.device}; the model was patched in {state.dtype} on "
                f"{state.device}. Unpatch, move the model and patch again"
            )
        if plan.entries != 1:
            self._check_rows(x, plan)

    def _is_cast(self, dtype: torch.dtype) -> bool:
        """Whether hooks let the base work in `dtype`."""
        return dtype in DENSE and (self._mlora.cast or self._mlora.outer is not None)

    def _check_rows(self, x: Tensor, plan: Plan) -> None:
        state = self._mlora
        if plan.entries == 1 or not x.numel():
            return
        scope = state.shared.active.get()
        if plan.uniform and scope.counted:  # equal ones
            return
        if state.foreign:
            others = scope.others
            if others is None:
                raise errors.AttributionError(
                    f"{state.name} reads another modality than text, and runs outside of a call of the patched model, "
                    f"so that its inputs cannot be attributed to rows; call the model itself, or use one adapter for "
                    f"all rows"
                )
            if others.attribute(x, state.index, state.name):
                return
        rows = x.shape[0] if x.dim() > 1 else 1
        if not state.gathered:
            counts = plan.row_counts if scope.choices == 1 else (plan.entries, plan.entries * scope.choices)
            picked = state.order.picked and x.dim() == 2 and scope.length > 1 and x.is_floating_point()
            if rows in counts and not picked and self._in_front(x, counts):
                return
            length = 0 if state.order.exchanged else scope.length
            if x.dim() == 2 and length and any(rows == count * length for count in counts):
                return  # (rows, length, in) flattened in order
            if state.order.windows and x.dim() > 2 and plan.entries and rows % plan.entries == 0:
                return  # (rows, windows, size, in) flattened in order
        exchanged = "in code that exchanges dimensions, as models do that put the length before the rows"
        what = exchanged if state.order.exchanged else "the module"
        what = "an expert, which gets tokens gathered from any rows" if state.gathered else what
        raise errors.AttributionError(
            f"{state.name} got an input of shape {tuple(x.shape)}, which cannot be attributed to the batch's "
            f"{plan.entries} rows ({what}); use one adapter for all rows, or adapters that do not target it"
        )

    def _in_front(self, x: Tensor, counts: Sequence[int]) -> bool:
        """Whether the first dimension of x, which is as long as the batch, is the rows: no other one is, or it was once
        where no other was."""
        state = self._mlora
        if not state.in_front and (inner := _inner(x)):
            state.in_front = not any(size in counts for size in inner)
            return state.in_front
        return True

    def _check_weight(self, weight: Tensor) -> None:
        """Of a plain layer that an adapter changes; what is called past the dispatcher looks itself."""
        state = self._mlora
        if weight.shape != state.shape:
            raise errors.ModelMovedError(
                f"{state.name} has a weight of shape {tuple(weight.shape)}; the model was patched with one of "
                f"{tuple(state.shape)}. Unpatch it, change it and patch it again"
            )

    def _check_autocast(self, x: Tensor) -> None:
        if torch.is_autocast_enabled(x.device.type):
            state = self._mlora
            raise errors.ModelMovedError(
                f"{state.name} runs under autocast to {torch.get_autocast_dtype(x.device.type)}; the model was patched "
                f"in {state.dtype}. Leave autocast, or unpatch the model, convert it, and patch it again"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        state = self._mlora
        if state.shared.active.get().late is not None:  # a call runs: a hook's, which casts the layer
            state.cast = True
        elif not state.cast:
            refuse_move(self, fn, state.shared.moves)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


def _inner(x: Tensor) -> list[int]:
    """The sizes between the first dimension and the features; ids have no features."""
    return list(x.shape[1:-1] if x.is_floating_point() else x.shape[1:])
