"""Parameters that `target_parameters` names other than linears' weights: which modules hold some, and their layer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import errors
from ..arena.bits import TAIL
from ..lowering import BaseLinear
from ..ops.checks import check_experts
from ..plan.plan import Plan
from ..plan.shared import Shared
from .cuts import check_local, cut_of
from .dense import is_dense
from .linear import LoraLayer
from .order import IN_FRONT, Order
from .route import Factors
from .state import LayerState
from .swap import twin_of

# What reads its parameters otherwise than by their names, or takes inputs that need not lie in rows of the batch.
_OTHERS = (nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.modules.conv._ConvNd)


Changes = Mapping[str, tuple[Factors, ...]]
"""Of one module: parameter -> the terms of its delta; only those that have some."""


class Stack(NamedTuple):
    """One parameter: that of fused experts, (experts, out, in), or (experts, in, out) where its module is transposed;
    or a matrix, (out, in), as routers have.

    Args:
        module: which holds it. `name`: under which.
    """

    module: nn.Module
    name: str

    def base(self, path: str) -> BaseLinear:
        """What a lowering may ask of it: the widths of each expert, or of the one matrix. No lowering reads it."""
        parameter = cast(Tensor, getattr(self.module, self.name))
        transposed = is_transposed(self.module)
        experts, inputs, outputs = _widths(parameter, transposed)

        def weight() -> Tensor:
            raise errors.UnsupportedAdapterError(f"parameter {path}: what depends on its base value is not served")

        cut = cut_of(self.module, self.name)
        return BaseLinear(path, inputs, outputs, weight, lambda: None, experts=experts, transposed=transposed, cut=cut)


def stacks_of(module: nn.Module) -> list[str]:
    """The names of the module's own parameters that are a matrix, or hold one for each of several experts."""
    if isinstance(module, _OTHERS) or _input_name(type(module)) is None:
        return []
    dense = {name: cast(Tensor, tensor) for name, tensor in module._parameters.items() if is_dense(tensor)}
    return [name for name, held in dense.items() if held.dim() == 2 or (held.dim() == 3 and held.shape[0] > 1)]


def is_transposed(module: nn.Module) -> bool:
    """Whether its experts' parameters lie as (experts, in, out): what PEFT asks as well."""
    return bool(getattr(module, "is_transposed", False))


def _widths(parameter: Tensor, transposed: bool) -> tuple[int, int, int]:
    """(experts, in, out) of a parameter; a matrix is that of one, and lies as (out, in) whatever its module says."""
    if parameter.dim() == 2:
        return 1, parameter.shape[1], parameter.shape[0]
    experts, rows, columns = parameter.shape
    return (experts, rows, columns) if transposed else (experts, columns, rows)


def _input_name(cls: Any) -> str | None:
    """What the class's forward calls its first input; None if it takes none."""
    names = [
        p.name
        for p in inspect.signature(cls.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return names[1] if len(names) > 1 else None


class ParametersState(LayerState):
    """What the layer of such parameters knows: `stacks` is parameter -> its number; `input` is what its
    forward calls its first input; `experts`, whether the parameters are experts' and it takes tokens with a choice of
    experts for each; `flattens`, whether it gives (rows * length, ...) of (rows, length, in), in order, None where that
    was not asked."""

    __slots__ = ("experts", "flattens", "input", "stacks")

    def __init__(
        self,
        name: str,
        home: int,
        shared: Shared,
        table: Tensor,
        module: nn.Module,
        dtype: torch.dtype,
        stacks: Mapping[str, int],
        order: Order = IN_FRONT,
    ) -> None:
        index = next(iter(stacks.values()))
        super().__init__(name, index, home, shared, table, module, dtype, order)
        self.stacks = dict(stacks)
        self.cut = cut_of(module, next(iter(stacks)))
        self.flattens: bool | None = None
        self.input = cast(str, _input_name(type(module)))
        self.experts = any(getattr(module, name).dim() == 3 for name in stacks)

    def numbers_of(self, parameter: str) -> tuple[int, ...]:
        return (self.stacks[parameter],) if parameter in self.stacks else ()


class ParametersLayer(LoraLayer):
    """Mixed in before the class of a module with such parameters: fused experts, a router.

    The tokens are divided by what recipes do here, and the module's own forward is called for each on its tokens, under
    parameters W + sum_i w_i s_i B_i A_i (of every expert), which is what PEFT puts in W's place; tokens without a delta
    go through the module as it is. The plan, on the host, and the number of tokens decide all of that. Experts are
    chosen token by token, so a token does not see which others it comes with; and of other modules, those that take
    nothing but hidden states see no more than their rows.
    """

    _mlora: ParametersState

    def forward(self, *args: Any, **named: Any) -> Any:
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            if shared.experts:
                check_experts(shared.header)
            return self._whole(*args, **named)
        scope = shared.active.get()
        plan = scope.plan or shared.default
        if shared.recorded and torch.is_grad_enabled():
            scope.check_told(state.name)
        if plan is None or not any(plan.touches[index] for index in state.stacks.values()):
            return self._whole(*args, **named)
        x = args[0] if args else named.get(state.input)
        if not isinstance(x, Tensor) or not x.dim():
            raise errors.AttributionError(f"{state.name} got no hidden states as its {state.input}")
        if state.cut is not None:
            check_local(x, state.name)
        self._check_autocast(x)
        if any(plan.touches[index] & TAIL for index in state.stacks.values()):
            plan = self._by_token(x, scope)
        self._check_rows(x, plan)
        return self._divided(x, args, named, plan)

    def _divided(self, x: Tensor, args: tuple[Any, ...], named: Mapping[str, Any], plan: Plan) -> Any:
        """One call of the base for each thing that recipes do to it, nothing included; a single one gets all arguments
        as they are."""
        parts = self._parts(plan)
        if len(parts) == 1:
            return self._under(parts[0][0], args, named)
        self._check_divisible(x, args, named)
        if plan.lengths and x.shape[0] == 1:  # packed: (1, tokens, in)
            front, tokens, each = 1, x.shape[1], 1
        else:
            front, tokens = 0, x.shape[0]
            each = tokens // plan.rows * (math.prod(x.shape[1:-1]) if self._flattens(x, args, named) else 1)
        outputs = []
        for changes, rows in parts:
            part = [self._picked(value, rows, tokens, front, plan) for value in args]
            others = {key: self._picked(value, rows, tokens, front, plan) for key, value in named.items()}
            outputs.append(self._under(changes, part, others))
        chosen = [rows for _, rows in parts]
        if not isinstance(outputs[0], tuple):
            return self._joined(outputs, chosen, each, plan)
        return tuple(self._joined(column, chosen, each, plan) for column in zip(*outputs, strict=True))

    @torch.no_grad()
    def _flattens(self, x: Tensor, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        """Whether of (rows, length, in) it gives (rows * length, ...), in order, as routers do: told by what its own
        forward makes of random numbers, of two rows together and apart. Asked once; the host waits."""
        state = self._mlora
        if state.flattens is None and not state.experts and x.dim() > 2:
            draw = torch.Generator().manual_seed(0)
            sample = torch.randn(2, *(3 for _ in x.shape[1:-1]), x.shape[-1], generator=draw).to(x)

            def given(part: Tensor) -> list[Tensor]:
                others = {key: part if value is x else value for key, value in named.items()}
                out = self._whole(*(part if value is x else value for value in args), **others)
                return [one for one in (out if isinstance(out, tuple) else (out,)) if isinstance(one, Tensor)]

            together, apart = given(sample), zip(*map(given, sample.split(1)), strict=True)
            state.flattens = all(
                one.dim() > 0 and len(one) == sample[..., 0].numel() and _is_near(one, torch.cat(two))
                for one, two in zip(together, apart, strict=True)
            )
        return bool(state.flattens)

    def _parts(self, plan: Plan) -> list[tuple[Changes, Tensor]]:
        """What recipes do to the module, and the plan's rows that get it."""
        rows: dict[tuple[tuple[Factors, ...], ...], list[Tensor]] = {}
        for route in plan.routes[self._mlora.home]:
            terms = tuple(route.terms.get(index, ()) for index in self._mlora.stacks.values())
            rows.setdefault(terms, []).append(route.rows)
        return [
            (
                {name: own for name, own in zip(self._mlora.stacks, terms, strict=True) if own},
                mine[0] if len(mine) == 1 else torch.cat(mine),
            )
            for terms, mine in rows.items()
        ]

    def _joined(self, outputs: Sequence[Any], chosen: Sequence[Tensor], each: int, plan: Plan) -> Tensor | None:
        """One output of all tokens from those of each call, `each` of a row; a router gives several."""
        if all(output is None for output in outputs):
            return None
        shapes = [output.shape[:2] for output in outputs if isinstance(output, Tensor)]
        if plan.lengths and shapes == [(1, len(rows)) for rows in chosen]:  # of packed tokens
            joined = self._joined([output[0] for output in outputs], chosen, each, plan)
            return None if joined is None else joined[None]
        for output, rows in zip(outputs, chosen, strict=True):
            wanted = len(rows) * each
            if not isinstance(output, Tensor) or not output.dim() or output.shape[0] != wanted:
                seen = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise errors.AttributionError(
                    f"{self._mlora.name} gave {seen} for {wanted} tokens, which cannot be attributed to the batch's "
                    f"{plan.rows} rows; use one adapter for all rows, or adapters that do not target it"
                )
        rows = torch.cat(list(outputs)).unflatten(0, (plan.rows, -1))
        return rows[torch.cat(list(chosen)).argsort()].flatten(0, 1)

    def _check_divisible(self, x: Tensor, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Raise unless a part of the tokens can be given to the module alone."""
        others = [value for value in (*args, *named.values()) if isinstance(value, Tensor) and value is not x]
        why = ""
        if any(isinstance(child, LoraLayer) for child in self.modules() if child is not self):
            why = "has layers inside, which take the whole batch"
        elif not self._mlora.experts and (others or not x.is_floating_point()):
            why = "takes other inputs than hidden states"
        if why:
            raise errors.AttributionError(
                f"{self._mlora.name} {why}, so that its tokens cannot be divided by recipe; use one adapter for all "
                f"rows, or adapters whose target_parameters do not name it"
            )

    def _picked(self, value: Any, rows: Tensor, tokens: int, front: int, plan: Plan) -> Any:
        """An argument's part for the tokens of some of the plan's rows, which lie behind `front` dimensions of 1."""
        if isinstance(value, Tensor) and value.dim():
            if front and value.shape[:2] == (1, tokens):
                return value[:, rows]
            if value.shape[0] == tokens:
                return value.unflatten(0, (plan.rows, -1))[rows].flatten(0, 1)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise errors.AttributionError(
            f"{self._mlora.name} got {seen} beside {tokens} tokens, which cannot be divided among them; use one "
            f"adapter for all rows, or adapters that do not target it"
        )

    def _under(self, changes: Changes, args: Any, named: Mapping[str, Any]) -> Any:
        """The base under changed parameters; as it is where none is."""
        if not changes:
            return self._whole(*args, **named)
        twin, cls = twin_of(self)
        changed = {name: self._weight(name, terms) for name, terms in changes.items()}
        twin.__dict__["_parameters"] = {**self.__dict__["_parameters"], **changed}
        return cls.forward(twin, *args, **named)

    def _weight(self, name: str, terms: Iterable[Factors]) -> Tensor:
        """W + sum_i w_i s_i B_i A_i (of every expert), summed in fp32 (fp64 for fp64) and rounded once."""
        weight = cast(Tensor, self._parameters[name])
        wide = torch.promote_types(weight.dtype, torch.float32)
        transposed, arena = is_transposed(self) and weight.dim() == 3, self._mlora.arena
        experts, inputs, outputs = _widths(weight, transposed)
        total = weight.to(wide).view(experts, *weight.shape[-2:])
        for term in terms:
            a, b = (
                arena[start : start + term.rank * width].view(experts, -1, width).to(wide)
                if start >= 0
                else torch.eye(width, dtype=wide, device=arena.device)[None]  # of a matrix that was trained whole
                for start, width in ((term.a, inputs), (term.b, outputs))
            )
            left, right = (a, b) if transposed else (b, a)
            total = torch.baddbmm(total, left.transpose(1, 2), right, alpha=term.factor)
        return total.to(weight.dtype).view(weight.shape)


def _is_near(got: Tensor, wanted: Tensor) -> bool:
    """Up to rounding, of whichever dtype."""
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= 0.01 * wanted.abs().max())
