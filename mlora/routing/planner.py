"""Entries -> the `Plan` of a forward, with its adapters on the device."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .. import errors
from ..arena.pack import Packed
from ..arena.store import Store
from ..plan.activation import Starts
from ..plan.plan import Plan, Recipe
from ..plan.shared import Shared
from .assembly import Assembly
from .bridges import Bridges
from .entries import is_single
from .merge_cache import MergeCache
from .pin import Pinned
from .ranks import Ranks
from .registry import Registry
from .tiers import Tiers


@dataclass(frozen=True, slots=True)
class _Kept:
    """A plan, and what it was made of.

    Args:
        made_of: all that its words depend on.
        entries: what asked for it, if that was a list of names and pinned entries, which mean the same as long as
            nothing in the store has moved and `folded` is what is folded in; else None.
    """

    plan: Plan
    made_of: tuple[Any, ...]
    entries: tuple[str | Pinned | None, ...] | None
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
        adapters: what was packed under its names, `versions` of which. `since`: how many adapters had been registered.
        placements: of the store. `folded`: what was folded in.
    """

    plan: Plan
    adapters: Mapping[str, Packed]
    versions: tuple[int, ...]
    since: int
    placements: int
    folded: Recipe


class Planner:
    """Makes plans, whose adapters stay pinned in the store until whoever asked for one releases `plan.names` there.

    Args:
        experts: the numbers of the modules that are parameters of experts.
        lock: the runtime's, see its `__init__`; reentrant.
        ranks: the processes that the model is split over, which must all ask for the same plan; None where it is not.
    """

    def __init__(
        self,
        registry: Registry,
        merges: MergeCache,
        bridges: Bridges,
        tiers: Tiers,
        store: Store,
        shared: Shared,
        experts: Sequence[int],
        lock: threading.RLock,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self._registry = registry
        self._merges = merges
        self._bridges = bridges
        self._tiers = tiers
        self._store = store
        self._assembly = Assembly(registry, store, shared, experts)
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
            RoutingError: the model is split over processes, and another one asks for other entries, or failed.
        """
        if self.ranks is None:
            return self._acquire(entries, rows, expansion, lengths, starts)
        try:
            plan = self._acquire(entries, rows, expansion, lengths, starts)
        except Exception as error:
            self.ranks.fail(error)
            raise
        try:
            self.ranks.agree_on(plan)
        except BaseException:
            self._store.release(plan.names)
            raise
        return plan

    def _acquire(
        self, entries: Any, rows: int, expansion: int, lengths: Sequence[int], starts: Sequence[Starts]
    ) -> Plan:
        with self._lock:
            kept = self._kept
            if kept is not None and kept.serves(
                entries, rows, expansion, lengths, self._store.placements, self._bridges.folded
            ):
                self._store.acquire(kept.plan.names)
                return kept.plan
        while True:
            with self._merges.resolved(entries) as resolved:  # nothing that is named may be deleted before it is pinned
                named = self._registry.recipes(resolved)
                pinned = [isinstance(one, Pinned) for one in ([resolved] if is_single(resolved) else resolved)]
                recipes, unmade = self._bridges.beside(named, pinned)
                if unmade is None:
                    listed = None if is_single(resolved) else rows
                    plan = self._plan(entries, recipes, listed, expansion, tuple(lengths), tuple(starts))
                    self._merges.trim()
                    return plan
            self._bridges.make(unmade)

    def bring(self, entry: Any) -> None:
        """Bring what one entry names to the device, or as far as there is room; raises as `acquire`."""
        with self._merges.resolved(entry) as resolved:
            (recipe,) = self._registry.recipes(resolved)
            with suppress(errors.CapacityError):  # its call will tell, if there is no room then
                self._store.bring([name for name, _ in recipe])

    def pinned(self, plan: Plan) -> Pinned:
        """The entry of a plan of one, whose adapters are pinned; the caller is a reader of the weights."""
        (recipe,) = plan.recipes
        return Pinned(recipe, (self._contents(recipe), self._contents(self._bridges.folded)))

    def widths(self, plan: Plan) -> dict[str, int]:
        """Of a plan of one: the sizes of the heads and embeddings that its adapters bring, by their modules' paths."""
        return {self._registry.paths[index]: int(heads.widths[0, 0]) for index, heads in plan.heads.items()}

    def _contents(self, recipe: Recipe) -> tuple[tuple[int, int, float], ...]:
        """Of adapters as they were loaded, or trained since, not of their names."""
        packed = [(self._store[name], weight) for name, weight in recipe]
        return tuple(sorted((one.number, one.version, weight) for one, weight in packed))

    def made(self, plan: Plan) -> Made:
        """Of a plan whose adapters are pinned; called under the lock."""
        store = self._store
        adapters = {name: store[name] for name in plan.names}
        versions = tuple(one.version for one in adapters.values())
        return Made(plan, adapters, versions, store.registered, store.placements, self._bridges.folded)

    def again(self, made: Made) -> Plan:
        """The plan, pinned: of the very same adapters, wherever they lie by now. The caller is a reader of the weights.

        Raises:
            RoutingError: one of them is gone or has been trained on, or something else is folded into the weights.
            CapacityError: they do not fit on the device together.
        """
        plan, store = made.plan, self._store
        with self._tiers.holding([name for name in made.adapters if name not in store]), self._lock:
            if self._bridges.folded is not made.folded:
                raise errors.RoutingError(
                    "a forward pass cannot be gone back over, or be computed again: what is folded into the weights "
                    "has changed since. Run backward before merge_adapter or unmerge_adapter"
                )
            for name, packed in made.adapters.items():
                if name not in store or store[name].number != packed.number:
                    raise errors.RoutingError(
                        f"a forward pass cannot be gone back over, or be computed again: its adapter {name!r} was "
                        f"deleted since. Run backward before delete_adapter"
                    )
            store.acquire(plan.names)
            try:
                for version, (name, packed) in zip(made.versions, made.adapters.items(), strict=True):
                    if packed.version != version:
                        raise errors.RoutingError(
                            f"adapter {name!r} has been trained on since the forward pass, of which a backward pass "
                            f"needs it as it was. Run backward before the optimizer's step"
                        )
                if not plan.names or store.placements == made.placements:
                    return plan
                return self._assembly.again(plan)
            except BaseException:
                store.release(plan.names)
                raise

    def of_tokens(self, plan: Plan, recipes: Sequence[Recipe], lengths: Sequence[int]) -> Plan:
        """As `Assembly.of_tokens`, for a call that is running."""
        with self._lock:
            return self._assembly.of_tokens(plan, recipes, lengths)

    def check_packed(self, entry: Any) -> list[str]:
        """Raise `AttributionError` where one entry cannot be packed beside others; raises as `acquire` too. Else the
        paths of the modules that it changes."""
        with self._merges.resolved(entry) as resolved:
            (recipe,) = self._registry.recipes(resolved)
            names = [name for name, _ in recipe]
            self._assembly.check_packed(names)
            return [self._registry.paths[index] for index in self._store.touched(names)]

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
        owners = [self._assembly.owners(recipe) for recipe in recipes]
        names = tuple(sorted({name for recipe in recipes for name, _ in recipe}))
        self._store.acquire(names)
        try:
            made_of = tuple(recipes), rows, expansion, lengths, self._store.placements
            if self._kept is not None and self._kept.made_of == made_of:
                plan = self._kept.plan
            else:
                self._assembly.check_starts(recipes, starts)
                if by_token := len(recipes) > 1 and bool(lengths):
                    self._assembly.check_packed(names)
                listed = 1 if rows is None or lengths else rows
                plan = self._assembly.plan(recipes, names, owners, listed, expansion, lengths, starts, by_token)
        except BaseException:
            self._store.release(names)
            raise
        # On a GPU a plan belongs to the stream that it was copied on, and with aLoRAs to the prompt of its call.
        if all(device.type == "cpu" for device in self._store.devices) and not plan.invocations:
            named = isinstance(entries, (list, tuple)) and all(
                one is None or type(one) in (str, Pinned) for one in entries
            )
            self._kept = _Kept(plan, made_of, tuple(entries) if named else None, self._bridges.folded)
        return plan
