"""Packed calls: sequences of any lengths one behind another in one row, each under a recipe of its own.

Where recipes differ, the rows of such a call's plan are tokens. Most modules get all of them; a head gets those of
which the caller wants answers (`logits_to_keep`), under a plan of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .. import errors
from .activation import Starts, last_occurrence
from .call import Call
from .plan import Plan, Recipe

Make = Callable[[Plan, Sequence[Recipe], Sequence[int]], Plan]
"""(plan, recipes, lengths) -> the plan whose rows are tokens, as many of each recipe as its length; its adapters are
those that `plan` has pinned."""


@dataclass
class Packing:
    """Of one call.

    Args:
        plan: of the routing. `make`: see `Make`.
        runs: (recipe, tokens) of all of the call's tokens, in order.
        picks: the indices of those that a head gets; None if it gets all of them.
        body: the dotted path of what comes before the head, and gets all of them.
        axes: dotted path of a module -> which dimension of its inputs is the tokens', where that was once plain to see.
    """

    plan: Plan
    make: Make
    runs: Sequence[tuple[Recipe, int]]
    picks: Sequence[int] | None
    body: str
    axes: MutableMapping[str, int]
    _plans: dict[tuple[int, ...] | None, Plan] = field(default_factory=dict, init=False)  # None: of all tokens

    def __post_init__(self) -> None:
        self.tokens = sum(length for _, length in self.runs)
        if self.picks is not None and list(self.picks) == list(range(self.tokens)):
            self.picks = None

    def plan_of(self, x: Tensor, module: str, loose: bool) -> Plan:
        """The plan for a module's input, (1, n, ...), (n, ...) or ids without a last dimension: of all tokens, or of
        those that were picked.

        Raises:
            AttributionError: it is of another number, or does not tell which dimension they are.
        """
        whole, shape = self._plans.get(None), x.shape
        told = self.picks is None and len(shape) == 3 and shape[:2] == (1, self.tokens) and _part.get() is None
        if told and whole is not None:  # so it is in most layers of most models: few calls
            return whole
        plan, axis = self.attribute(x, module)
        if math.prod(x.shape[:axis]) != 1:
            raise self._unattributed(x, module)
        return plan

    def attribute(self, x: Tensor, module: str) -> tuple[Plan, int]:
        """`plan_of`, and which dimension of x its tokens are. That may be another than the first that is longer than 1,
        as in (1, heads, n, width)."""
        sizes = x.shape[:-1] if x.is_floating_point() else x.shape
        inside = not self.body or module.startswith(f"{self.body}.")
        picks = None if inside else _part.get() or self.picks
        counts = [self.tokens] if picks is None else [len(picks), self.tokens]
        axis = self._axis(sizes, counts, module)
        if axis is None or sizes[axis] not in counts:
            raise self._unattributed(x, module)
        chosen = None if picks is None or sizes[axis] != len(picks) else tuple(picks)
        if chosen not in self._plans:
            self._plans[chosen] = self._whole() if chosen is None else self._picked(chosen)
        return self._plans[chosen], axis

    def _axis(self, sizes: Sequence[int], counts: Sequence[int], module: str) -> int | None:
        """Which dimension the tokens are; remembered where no other could be. None if it cannot be told."""
        if len(sizes) == 1 or (len(sizes) == 2 and sizes[0] == 1):
            return len(sizes) - 1  # (n, width) or (1, n, width), whatever n is
        fits = [axis for axis, size in enumerate(sizes) if size in counts]
        if len(fits) == 1:
            self.axes[module] = fits[0]
        axis = self.axes.get(module)
        return axis if axis in fits else None

    def _unattributed(self, x: Tensor, module: str) -> errors.AttributionError:
        return errors.AttributionError(
            f"{module} got an input of shape {tuple(x.shape)} in a packed call of {self.tokens} tokens, to which it "
            f"cannot be attributed; use one entry for all sequences, or adapters that do not target it"
        )

    def _whole(self) -> Plan:
        if not self.plan.invocations:
            return self.plan
        return self.make(self.plan, [recipe for recipe, _ in self.runs], [length for _, length in self.runs])

    def _picked(self, picks: Sequence[int]) -> Plan:
        of_token = [recipe for recipe, length in self.runs for _ in range(length)]
        return self.make(self.plan, [of_token[index] for index in picks], [1] * len(picks))


_part: ContextVar[range | None] = ContextVar("mlora part", default=None)


@contextmanager
def part_of_tokens(part: range) -> Iterator[None]:
    """While a head is called with these of a packed call's tokens."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


class Model(Protocol):
    """What is known of the model, see `Packing`."""

    body: str
    axes: dict[str, int]


def packing_of(plan: Plan, call: Call, make: Make, model: Model) -> Packing:
    """Of a call under a plan with `lengths`.

    Raises:
        AttributionError: the plan has aLoRAs, and neither was given where they start nor does the call tell.
    """
    recipes = plan.recipes if len(plan.recipes) > 1 else plan.recipes * len(plan.lengths)
    runs = list(zip(recipes, plan.lengths, strict=True))
    if plan.invocations:
        starts = plan.starts or _starts(plan, recipes, call)
        runs = [run for own, start in zip(runs, starts, strict=True) for run in _cut(*own, start)]
    return Packing(plan, make, runs, _picks(call, sum(plan.lengths)), model.body, model.axes)


def _picks(call: Call, tokens: int) -> list[int] | None:
    """Of which tokens the caller wants answers, as transformers reads it; None: of all."""
    keep = call.kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor):
        return torch.arange(tokens)[keep.cpu()].tolist()
    return None if not keep or keep >= tokens else list(range(tokens - keep, tokens))


def _cut(recipe: Recipe, length: int, starts: Starts) -> list[tuple[Recipe, int]]:
    """A sequence's runs, cut where one of its aLoRAs starts; `starts` lacks none of them."""
    first = {name: length if start is None else min(max(start, 0), length) for name, start in starts.items()}
    return [
        (tuple(term for term in recipe if first.get(term[0], 0) <= begin), end - begin)
        for begin, end in pairwise(sorted({0, *first.values(), length}))
    ]


def _starts(plan: Plan, recipes: Sequence[Recipe], call: Call) -> list[Starts]:
    """Where each sequence's aLoRAs start, by the call's own ids."""
    ids, names = call.ids, ", ".join(map(repr, plan.invocations))
    if ids is None or call.past != 0:
        why = "has no input_ids" if ids is None else "goes on behind tokens in a cache"
        raise errors.AttributionError(
            f"{names} (aLoRA) applies from its invocation tokens on, and the packed call {why}: give `starts` to "
            f"use_adapters"
        )
    parts = torch.split(ids.flatten().cpu(), list(plan.lengths))
    return [
        {name: last_occurrence(part.tolist(), plan.invocations[name]) for name, _ in recipe if name in plan.invocations}
        for part, recipe in zip(parts, recipes, strict=True)
    ]
