"""Entries -> the `Plan` of a forward, with its adapters on the device."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from .. import errors, layout
from ..arena.bits import BOTH, GAIN, INPUT, TAIL, TURN
from ..arena.pack import Packed
from ..arena.store import Store
from ..layers import Head, group_heads, group_routes
from ..plan.activation import Starts
from ..plan.plan import Plan, Recipe, plan_words, to_device
from ..plan.shared import Shared
from .bridges import Bridges
from .entries import is_single
from .merge_cache import MergeCache
from .registry import Registry


@dataclass(frozen=True, slots=True)
class _Kept:
    """A plan, and what it was made of.

    Args:
        made_of: all that its words depend on.
        entries: what asked for it, if that was a list of names, which mean the same as long as nothing in the store has
            moved and `folded` is what is folded in; else None.
    """

    plan: Plan
    made_of: tuple[Any, ...]
    entries: tuple[str | None, ...] | None
    folded: Recipe

    def serves(
        self, entries: Any, rows: int, expansion: int, lengths: Sequence[int], placements: int, folded: Recipe
    ) -> bool:
        """Whether these very entries ask for it again, without looking at what they are."""
        return (
            self.entries is not None
            and isinstance(entries, (list, tuple))
            and len(entries) == len(self.entries)
            and all(map(operator.is_, entries, self.entries))
            and self.made_of[1:] == (rows, expansion, tuple(lengths), placements)
            and self.folded == folded
        )


@dataclass(frozen=True, slots=True)
class Made:
    """A plan, and all that it holds for; it pins nothing.

    Args:
        adapters: what was packed under its names. `since`: how many adapters had been registered.
        placements: of the store. `folded`: what was folded in.
    """

    plan: Plan
    adapters: Mapping[str, Packed]
    since: int
    placements: int
    folded: Recipe


class Planner:
    """Makes plans, whose adapters stay pinned in the store until whoever asked for one releases `plan.names` there.

    Args:
        experts: the numbers of the modules that are parameters of experts.
        lock: the runtime's, see its `__init__`; reentrant.
    """

    def __init__(
        self,
        registry: Registry,
        merges: MergeCache,
        bridges: Bridges,
        store: Store,
        shared: Shared,
        experts: Sequence[int],
        lock: threading.RLock,
    ) -> None:
        self._registry = registry
        self._merges = merges
        self._bridges = bridges
        self._store = store
        self._shared = shared
        self._experts = list(experts)
        self._lock = lock
        # The last plan: a loop of decode steps asks for the same each time, and making it anew takes one per cent or
        # two of a small model's step.
        self._kept: _Kept | None = None

    def acquire(
        self, entries: Any, rows: int, expansion: int, lengths: Sequence[int] = (), starts: Sequence[Starts] = ()
    ) -> Plan:
        """Resolve, bring to the device and pin. The caller is a reader of the weights or holds the lock. `lengths` and
        `starts`: of packed sequences, as `Plan` has them; `rows` is the number of these.

        Raises:
            EntryError, UnknownAdapterError, MergeError: an entry is none, or there are not as many as `rows`.
            AttributionError: an adapter changes what gets the tokens of packed sequences in no order.
            CapacityError: the adapters do not fit on the device together, or the plan not in its buffer.
        """
        with self._lock:
            kept = self._kept
            if kept is not None and kept.serves(
                entries, rows, expansion, lengths, self._store.placements, self._bridges.folded
            ):
                self._store.acquire(kept.plan.names)
                return kept.plan
        while True:
            with self._merges.resolved(entries) as resolved:  # nothing that is named may be deleted before it is pinned
                recipes, unmade = self._bridges.beside(self._registry.recipes(resolved))
                if unmade is None:
                    listed = None if is_single(resolved) else rows
                    plan = self._plan(entries, recipes, listed, expansion, tuple(lengths), tuple(starts))
                    self._merges.trim()
                    return plan
            self._bridges.make(unmade)

    def made(self, plan: Plan) -> Made:
        """Of a plan whose adapters are pinned; called under the lock."""
        store = self._store
        adapters = {name: store[name] for name in plan.names}
        return Made(plan, adapters, store.registered, store.placements, self._bridges.folded)

    def again(self, made: Made) -> Plan:
        """The plan, pinned: of the very same adapters, wherever they lie by now. The caller is a reader of the weights.

        Raises:
            RoutingError: one of them is gone, or something else is folded into the weights.
            CapacityError: they do not fit on the device together.
        """
        plan, store = made.plan, self._store
        with self._lock:
            if self._bridges.folded is not made.folded:
                raise errors.RoutingError(
                    "a checkpointed forward pass cannot be computed again: what is folded into the weights has changed "
                    "since. Run backward before merge_adapter or unmerge_adapter"
                )
            for name, packed in made.adapters.items():
                if name not in store or store[name] is not packed:
                    raise errors.RoutingError(
                        f"a checkpointed forward pass cannot be computed again: its adapter {name!r} was deleted "
                        f"since. Run backward before delete_adapter"
                    )
            store.acquire(plan.names)
            if not plan.names or store.placements == made.placements:
                return plan
            try:
                owners = [self._owners(recipe) for recipe in plan.recipes]
                entries, repeated = plan.row_counts
                return self._of_pinned(
                    plan.recipes, plan.names, owners, entries, repeated // entries, plan.lengths, plan.starts
                )
            except BaseException:
                store.release(plan.names)
                raise

    def of_tokens(self, plan: Plan, recipes: Sequence[Recipe], lengths: Sequence[int]) -> Plan:
        """A plan whose rows are tokens, as many of each recipe as its length; `plan` has pinned what it names."""
        with self._lock:
            owners = [self._owners(recipe) for recipe in recipes]
            return self._of_pinned(recipes, plan.names, owners, 1, 1, lengths, by_token=True)

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

    def check_since(self, names: Sequence[str], since: int) -> None:
        """Raise `RoutingError` if one means an adapter that is newer than what is computed again."""
        for name in names:
            if self._store[name].number > since:
                raise errors.RoutingError(
                    f"a checkpointed forward pass cannot be computed again: adapter {name!r}, which it names, was "
                    f"loaded since. Load it before, and run backward before delete_adapter"
                )

    def _plan(
        self,
        entries: Any,
        recipes: Sequence[Recipe],
        rows: int | None,
        expansion: int,
        lengths: tuple[int, ...],
        starts: tuple[Starts, ...],
    ) -> Plan:
        """Of one recipe a row, which came of `entries`; `rows` is None where one serves them all."""
        if rows is not None and len(recipes) != rows:
            what = f"{rows} packed sequences" if lengths else f"a batch of {rows} rows"
            raise errors.EntryError(f"adapter_names has {len(recipes)} entries for {what}")
        if len(set(recipes)) == 1:
            recipes = recipes[:1]
        owners = [self._owners(recipe) for recipe in recipes]
        names = tuple(sorted({name for recipe in recipes for name, _ in recipe}))
        self._store.acquire(names)
        try:
            made_of = tuple(recipes), rows, expansion, lengths, self._store.placements
            if self._kept is not None and self._kept.made_of == made_of:
                plan = self._kept.plan
            else:
                self._check_starts(recipes, starts)
                if by_token := len(recipes) > 1 and bool(lengths):
                    self.check_packed(names)
                listed = 1 if rows is None or lengths else rows
                plan = self._of_pinned(recipes, names, owners, listed, expansion, lengths, starts, by_token)
        except BaseException:
            self._store.release(names)
            raise
        # On a GPU a plan belongs to the stream that it was copied on, and with aLoRAs to the prompt of its call.
        if self._store.arena.device.type == "cpu" and not plan.invocations:
            named = isinstance(entries, (list, tuple)) and all(one is None or type(one) is str for one in entries)
            self._kept = _Kept(plan, made_of, tuple(entries) if named else None, self._bridges.folded)
        return plan

    def _check_starts(self, recipes: Sequence[Recipe], starts: Sequence[Starts]) -> None:
        """Raise `EntryError` where `starts` of packed sequences lack an aLoRA of theirs."""
        of_each = recipes if len(recipes) > 1 else list(recipes) * len(starts)
        for own, recipe in zip(starts, of_each, strict=False):
            for name, _ in recipe:
                if self._store[name].invocation and name not in own:
                    raise errors.EntryError(
                        f"starts does not tell where {name!r} (aLoRA) starts in one of its sequences"
                    )

    def _of_pinned(
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
        recipe, as `_owners` says. `by_token`: whether the plan's rows are tokens, `lengths` of each recipe."""
        store = self._store
        packed = {name: store[name] for name in names}
        runs = lengths if by_token else [1] * len(recipes)
        rows = sum(runs)
        heads: dict[int, list[Head | None]] = {index: [None] * rows for one in packed.values() for index in one.heads}
        for (start, end), owned in zip(pairwise(accumulate(runs, initial=0)), owners, strict=True):
            for index, name in owned.items():
                weight, bias, width = packed[name].heads[index]
                offset = packed[name].offset
                head = Head(offset + weight, bias if bias < 0 else offset + bias, width)
                heads[index][start:end] = [head] * (end - start)
        touches = np.zeros(store.tables.shape[0], dtype=np.uint8)
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
        device, most = store.arena.device, self._shared.plan.numel()
        if len(words) > most and device.type != "cpu":
            raise errors.CapacityError(
                f"the routing of {rows} rows takes {len(words)} words; the buffer that compiled code and captured "
                f"graphs read has {most}"
            )
        tensor = to_device(words, device)
        header = torch.from_numpy(words[: layout.PLAN_HEADER])
        grouped = {index: group_heads(found, self._width(index), device) for index, found in heads.items()}
        of_row = [recipe for recipe, run in zip(recipes, runs, strict=True) for _ in range(run)] if experts else []
        routes = group_routes(of_row, packed, self._experts, device) if experts else ()
        counts = (entries, entries * expansion)
        trained = frozenset().union(*(one.trained for one in packed.values()))
        return Plan(
            tensor,
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
        )

    def _width(self, index: int) -> int:
        """How many outputs the model's own head has, or tokens its embedding."""
        base = self._registry.bases[self._registry.paths[index]]
        return base.out_features if base.embed_scale is None else base.in_features

    def _owners(self, recipe: Recipe) -> Mapping[int, str]:
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
