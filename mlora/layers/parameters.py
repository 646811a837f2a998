"""Parameters that `target_parameters` names other than linears' weights: which modules hold some, and their layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import errors
from ..lowering import BaseLinear
from ..ops import reference
from ..ops.checks import check_experts
from ..ops.reference import Term
from ..routing import Plan
from .dense import is_dense
from .linear import LoraLayer
from .state import LayerState, Shared
from .swap import twin_of

# What reads its parameters otherwise than by their names, or takes inputs that need not lie in rows of the batch.
_OTHERS = (nn.Embedding, nn.MultiheadAttention, nn.RNNBase, nn.modules.conv._ConvNd)


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
        experts, inputs, outputs = _widths(parameter, is_transposed(self.module))

        def weight() -> Tensor:
            raise errors.UnsupportedAdapterError(f"parameter {path}: what depends on its base value is not served")

        return BaseLinear(path, inputs, outputs, weight, lambda: None, experts=experts)


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
    """What the layer of such parameters knows: `stacks` is parameter -> (its number, its rows of the store's tables);
    `input` is what its forward calls its first input; `experts`, whether the parameters are experts' and it takes
    tokens with a choice of experts for each."""

    __slots__ = ("experts", "input", "stacks")

    def __init__(
        self,
        name: str,
        shared: Shared,
        module: nn.Module,
        dtype: torch.dtype,
        stacks: Mapping[str, tuple[int, Tensor]],
    ) -> None:
        index, table = next(iter(stacks.values()))
        super().__init__(name, index, shared, table, module, dtype)
        self.stacks = dict(stacks)
        self.input = cast(str, _input_name(type(module)))
        self.experts = any(getattr(module, name).dim() == 3 for name in stacks)


class ParametersLayer(LoraLayer):
    """Mixed in before the class of a module with such parameters: fused experts, a router.

    The tokens are divided by recipe, and the module's own forward is called for each on its tokens, under parameters
    W + sum_i w_i s_i B_i A_i (of every expert), which is what PEFT puts in W's place; tokens without a delta go through
    the module as it is. Experts are chosen token by token, so a token does not see which others it comes with; and of
    other modules, those that take nothing but hidden states see no more than their rows.
    """

    _mlora: ParametersState

    def forward(self, *args: Any, **named: Any) -> Any:
        state = self._mlora
        shared = state.shared
        if torch.compiler.is_compiling():
            if shared.experts:
                check_experts(shared.plan)
            return self._whole(args, named)
        plan = shared.local.plan or shared.default
        if plan is None or not any(plan.touches[index] for index, _ in state.stacks.values()):
            return self._whole(args, named)
        x = args[0] if args else named.get(state.input)
        if not isinstance(x, Tensor) or not x.dim():
            raise errors.AttributionError(f"{state.name} got no hidden states as its {state.input}")
        self._check_autocast(x)
        if not plan.uniform:
            self._check_rows(x, plan)
        return self._divided(x, args, named, plan)

    def _whole(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """The module as it is."""
        return super(LoraLayer, self).forward(*args, **named)

    def _divided(self, x: Tensor, args: tuple[Any, ...], named: Mapping[str, Any], plan: Plan) -> Any:
        """One call of the base for each recipe that changes it and one for all other tokens; a single one gets all
        arguments as they are."""
        tokens = x.shape[0]
        recipes, chosen = self._recipes(plan, tokens)
        if len(chosen) == 1 and len(chosen[0]) == tokens:
            return self._under(recipes[0], args, named)
        self._check_divisible(x, args, named)
        left = torch.ones(tokens, dtype=torch.bool, device=x.device)
        for rows in chosen:
            left[rows] = False
        if len(rest := left.nonzero()[:, 0]):
            recipes.append({})
            chosen.append(rest)
        outputs = []
        for recipe, rows in zip(recipes, chosen, strict=True):
            part = [self._picked(value, rows, tokens) for value in args]
            outputs.append(self._under(recipe, part, {key: self._picked(v, rows, tokens) for key, v in named.items()}))
        order = torch.cat(chosen).argsort()
        if not isinstance(outputs[0], tuple):
            return self._joined(outputs, chosen, order, plan)
        return tuple(self._joined(column, chosen, order, plan) for column in zip(*outputs, strict=True))

    def _joined(self, outputs: Sequence[Any], chosen: Sequence[Tensor], order: Tensor, plan: Plan) -> Tensor | None:
        """One output of all tokens from those of each recipe; a router gives several."""
        if all(output is None for output in outputs):
            return None
        for output, rows in zip(outputs, chosen, strict=True):
            if not isinstance(output, Tensor) or not output.dim() or output.shape[0] != len(rows):
                seen = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise errors.AttributionError(
                    f"{self._mlora.name} gave {seen} for {len(rows)} tokens, which cannot be attributed to the batch's "
                    f"{plan.rows} rows; use one adapter for all rows, or adapters that do not target it"
                )
        return torch.cat(list(outputs))[order]

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

    def _recipes(self, plan: Plan, tokens: int) -> tuple[list[dict[str, list[Term]]], list[Tensor]]:
        """Of each recipe that changes the module: the terms of each parameter that it changes, and its tokens."""
        recipes: list[dict[str, list[Term]]] = []
        chosen: list[Tensor] = []
        stacks = self._mlora.stacks
        for routes in zip(*(reference.routes(plan.tensor, table, tokens) for _, table in stacks.values()), strict=True):
            changed = {name: [t for t in route.terms if t.rank] for name, route in zip(stacks, routes, strict=True)}
            changed = {name: terms for name, terms in changed.items() if terms}
            if changed:
                recipes.append(changed)
                chosen.append(routes[0].tokens)
        return recipes, chosen

    def _picked(self, value: Any, rows: Tensor, tokens: int) -> Any:
        """An argument's part for some of the tokens."""
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == tokens:
            return value[rows]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        seen = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise errors.AttributionError(
            f"{self._mlora.name} got {seen} beside {tokens} tokens, which cannot be divided among them; use one "
            f"adapter for all rows, or adapters that do not target it"
        )

    def _under(self, recipe: Mapping[str, list[Term]], args: Any, named: Mapping[str, Any]) -> Any:
        """The base under the weights of a recipe; as it is under none."""
        if not recipe:
            return self._whole(args, named)
        twin, cls = twin_of(self)
        changed = {name: self._weight(name, terms) for name, terms in recipe.items()}
        twin.__dict__["_parameters"] = {**self.__dict__["_parameters"], **changed}
        return cls.forward(twin, *args, **named)

    def _weight(self, name: str, terms: list[Term]) -> Tensor:
        """W + sum_i w_i s_i B_i A_i (of every expert), summed in fp32 (fp64 for fp64) and rounded once."""
        weight: Tensor = getattr(self, name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        transposed, arena = is_transposed(self) and weight.dim() == 3, self._mlora.shared.arena
        experts, inputs, outputs = _widths(weight, transposed)
        total = weight.to(wide).view(experts, *weight.shape[-2:])
        for term in terms:
            a, b = (
                arena[start : start + term.rank * width].view(experts, -1, width).to(wide)
                for start, width in ((term.a, inputs), (term.b, outputs))
            )
            left, right = (a, b) if transposed else (b, a)
            total = torch.baddbmm(total, left.transpose(1, 2), right, alpha=term.weight * term.scale)
        return total.to(weight.dtype).view(weight.shape)
