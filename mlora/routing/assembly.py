"""Recipes of pinned adapters -> the `Plan`, as layers and kernels read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from .. import errors, layout
from ..arena.bits import BOTH, GAIN, INPUT, TAIL, TURN
from ..arena.store import Store
from ..layers import Head, Route, group_heads, group_routes
from ..plan.activation import Starts
from ..plan.plan import Plan, Recipe, plan_words, to_device
from ..plan.shared import Shared
from .registry import Registry


class Assembly:
    """Makes plans. What a plan names is pinned as long as it is used, so that it does not move; the caller holds the
    lock.

    Args:
        experts: the numbers of the modules that are parameters of experts.
    """

    def __init__(self, registry: Registry, store: Store, shared: Shared, experts: Sequence[int]) -> None:
        self._registry = registry
        self._store = store
        self._shared = shared
        self._experts = list(experts)

    def plan(
        self,
        recipes: Sequence[Recipe],
        names: tuple[str, ...],
        owners: Sequence[Mapping[int, str]],
        entries: int,
        expansion: int,
        lengths: Sequence[int] = (),
        starts: Sequence[Starts] = (),
        by_token: bool = False,
    ) -> Plan:
        """Of recipes of adapters that do not move: one for each of `entries`, or one for all of them. `owners`: of each
        recipe, as `owners` says. `by_token`: whether the plan's rows are tokens, `lengths` of each recipe."""
        store = self._store
        packed = {name: store[name] for name in names}
        runs = lengths if by_token else [1] * len(recipes)
        rows = sum(runs)
        heads: dict[int, list[Head | None]] = {index: [None] * rows for one in packed.values() for index in one.heads}
        for (start, end), owned in zip(pairwise(accumulate(runs, initial=0)), owners, strict=True):
            for index, name in owned.items():
                weight, bias, width = packed[name].heads[index]
                weight, bias = (at if at < 0 else store.offset(packed[name], index, at) for at in (weight, bias))
                head = Head(weight, bias, width)
                heads[index][start:end] = [head] * (end - start)
        touches = np.zeros(store.modules, dtype=np.uint8)
        for one in packed.values():
            touches |= one.touches
        if (touches & INPUT).any():  # few plans have any, and each one is made within a forward
            for recipe in {recipe for recipe in recipes if recipe}:
                both = np.bitwise_or.reduce([packed[name].touches for name, _ in recipe])
                touches[((both & INPUT) > 0) & ((both & (GAIN | TURN)) > 0)] |= BOTH
        terms = [store.terms(recipe) for recipe in recipes]
        invocations = {name: one.invocation for name, one in packed.items() if one.invocation}
        experts = bool(touches[self._experts].any())
        foreign = rows > 1 and any(touches[index] for index in self._shared.foreign)
        if by_token:
            touches[touches > 0] |= TAIL
        listed = rows if by_token else entries
        words = plan_words(terms, expansion, bool(heads), experts, bool(invocations), foreign, runs, listed)
        devices, most = store.devices, self._shared.words[0].numel()
        if len(words) > most and any(device.type != "cpu" for device in devices):
            raise errors.CapacityError(
                f"the routing of {rows} rows takes {len(words)} words; the buffer that compiled code and captured "
                f"graphs read has {most}"
            )
        tensors = tuple(to_device(words, device) for device in devices)
        header = torch.from_numpy(words[: layout.PLAN_HEADER])
        grouped = {
            index: group_heads(found, self._width(index), devices[store.homes[index]]) for index, found in heads.items()
        }
        routes: tuple[tuple[Route, ...], ...] = ()
        if experts:
            of_row = [recipe for recipe, run in zip(recipes, runs, strict=True) for _ in range(run)]
            routes = tuple(
                group_routes(
                    of_row, packed, [index for index in self._experts if store.homes[index] == home], home, device
                )
                for home, device in enumerate(devices)
            )
        counts = (entries, entries * expansion)
        trained = frozenset().union(*(one.trained for one in packed.values()))
        return Plan(
            tensors,
            header,
            touches.tobytes(),
            names,
            rows,
            counts,
            grouped,
            routes,
            tuple(recipes),
            invocations,
            trained,
            entries,
            tuple(lengths),
            starts,
            by_token,
        )

    def again(self, plan: Plan) -> Plan:
        """The same plan, of adapters that may have moved since; they are pinned."""
        entries, repeated = plan.row_counts
        return self.plan(
            plan.recipes,
            plan.names,
            [self.owners(recipe) for recipe in plan.recipes],
            entries,
            repeated // entries,
            plan.lengths,
            plan.starts,
            plan.by_token,
        )

    def _width(self, index: int) -> int:
        """How many outputs the model's own head has, or tokens its embedding."""
        base = self._registry.bases[self._registry.paths[index]]
        return base.out_features if base.embed_scale is None else base.in_features

    def owners(self, recipe: Recipe) -> Mapping[int, str]:
        """Module number -> the adapter of `recipe` whose head or embedding of another size serves there."""
        found: dict[int, str] = {}
        for name, weight in recipe:
            for index in self._store[name].heads:
                beside = [other for other, _ in recipe if other != name and self._store[other].touches[index]]
                if weight != 1 or beside:
                    with_what = f"with {', '.join(map(repr, beside))}" if beside else f"at a weight of {weight}"
                    raise errors.EntryError(
                        f"adapter {name!r} has weights of another size at {self._registry.paths[index]}, which take "
                        f"the place of the model's: there is no sum {with_what}"
                    )
                found[index] = name
        return found

    def of_tokens(self, plan: Plan, recipes: Sequence[Recipe], lengths: Sequence[int]) -> Plan:
        """A plan whose rows are tokens, as many of each recipe as its length; `plan` has pinned what it names."""
        owners = [self.owners(recipe) for recipe in recipes]
        return self.plan(recipes, plan.names, owners, 1, 1, lengths, by_token=True)

    def check_packed(self, names: Iterable[str]) -> None:
        """Raise `AttributionError` where one of these adapters changes what gets the tokens of packed sequences in no
        known order."""
        for name in names:
            for index in np.flatnonzero(self._store[name].touches).tolist():
                if why := self._shared.unpacked.get(index):
                    raise errors.AttributionError(
                        f"adapter {name!r} changes {self._registry.paths[index]}, {why}: the tokens of packed "
                        f"sequences cannot be told apart there; use one entry for all of them, or adapters that do not "
                        f"target it"
                    )

    def check_starts(self, recipes: Sequence[Recipe], starts: Sequence[Starts]) -> None:
        """Raise `EntryError` where `starts` of packed sequences lack an aLoRA of theirs."""
        of_each = recipes if len(recipes) > 1 else list(recipes) * len(starts)
        for own, recipe in zip(starts, of_each, strict=False):
            for name, _ in recipe:
                if self._store[name].invocation and name not in own:
                    raise errors.EntryError(
                        f"starts does not tell where {name!r} (aLoRA) starts in one of its sequences"
                    )
