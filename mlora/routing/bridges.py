"""Rows beside what is folded into the weights: routes that do there what theirs would do on the base's."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from .. import errors
from ..arena.bits import GAIN, INPUT, TURN
from ..arena.store import Store
from ..folding.fold import Folded
from ..lowering import BaseLinear, Delta, Lowered, to_adapter
from ..merge import relative
from ..plan.plan import Recipe
from .registry import Registry


class Bridges:
    """What undoes the folded recipe and does another: the difference of both, where neither has gains or turns, and
    else an adapter that is made for it, a bridge, and kept until something else is folded in.

    Args:
        lock: the runtime's, see its `__init__`; reentrant.
    """

    def __init__(self, registry: Registry, folded: Folded, store: Store, lock: threading.RLock) -> None:
        self._registry = registry
        self._folded = folded
        self._store = store
        self._bridges: dict[str, None] = {}
        self._lock = lock

    @property
    def folded(self) -> Recipe:
        """What rows lie beside."""
        return self._folded.recipe

    def beside(
        self, recipes: Sequence[Recipe], pinned: Sequence[bool] | None = None
    ) -> tuple[Sequence[Recipe], Recipe | None]:
        """What to route in place of `recipes`, and the first of these whose bridge `make` has yet to make, which it
        names already; None if there is none. Those that are `pinned` lie beside what is folded in already. Called under
        the lock."""
        if not self._folded.recipe:
            return recipes, None
        relatives, unmade = [], None
        for recipe, there in zip(recipes, pinned or [False] * len(recipes), strict=True):
            relatives.append(names := recipe if there else self._relative(recipe))
            if unmade is None and any(name not in self._store for name, _ in names):
                unmade = recipe
        return relatives, unmade

    def _relative(self, recipe: Recipe) -> Recipe:
        folded = self._folded.recipe
        if not any((self._store[name].touches & (GAIN | TURN | INPUT)).any() for name, _ in (*recipe, *folded)):
            difference = dict(recipe)
            for name, weight in folded:
                difference[name] = difference.get(name, 0.0) - weight
            return tuple(sorted((name, weight) for name, weight in difference.items() if weight))
        label = self._label(recipe, folded)
        return () if recipe == folded else ((self._registry.key(label) or label, 1.0),)

    def make(self, recipe: Recipe) -> None:
        """Make the bridge from what is folded in to `recipe`: lowered without the lock, which the caller need not hold,
        and dropped where one of their adapters has gone meanwhile. What is folded in stays: the caller is a reader of
        the weights, or holds the lock.

        Nothing is made where an adapter is not on the host any more: whoever asks looks again.

        Raises:
            MergeError: no delta does that.
        """
        registry = self._registry
        with self._lock:
            folded = self._folded.recipe
            found = {key: registry.by_key(key) for key, _ in (*recipe, *folded)}
            sources = {key: one for key, one in found.items() if one is not None}
            if len(sources) < len(found):
                return
            registry.check_settled(sources, "what serves it beside what is folded in")
            label = self._label(recipe, folded)
        bases = registry.bases
        lowered = {key: registry.lower(one.info.name, one) for key, one in sources.items()}
        deltas = _between(folded, recipe, lowered, bases)
        adapter = to_adapter(deltas, label, bases)
        with self._lock:
            same = all(registry.by_key(key) is one for key, one in sources.items())
            if same and label not in registry:  # another thread may have made it
                names = [one.info.name for one in sources.values()]
                registry.add(label, adapter, Lowered(deltas), sources=names, group=self._bridges)

    def _label(self, recipe: Recipe, folded: Recipe) -> str:
        """Of a bridge: by its adapters' numbers too, since a name may get another content."""
        does, undoes = ({f"{key} #{self._store[key].number}": w for key, w in side} for side in (recipe, folded))
        return f"{does} on {undoes}"

    def drop(self) -> None:
        """Forget those that no call uses; what is folded in has changed. Called under the lock."""
        unused = [label for label in self._bridges if (one := self._registry.packed(label)) and not one.pins]
        for label in unused:
            self._registry.remove(label)


def _between(
    folded: Recipe, recipe: Recipe, deltas: Mapping[str, Mapping[str, Delta]], bases: Mapping[str, BaseLinear]
) -> dict[str, Delta]:
    """Dotted path -> delta of the bridge; `deltas`: adapter -> dotted path -> delta."""
    paths = dict.fromkeys(path for found in deltas.values() for path in found)
    for path in paths:
        if bases[path].experts:
            raise errors.MergeError(
                f"parameter {path}: rows with target_parameters are served beside something folded in only where none "
                f"of the adapters has gains or turns, as DoRA, IA3 and OFT do; unmerge_adapter first"
            )

    def terms(recipe: Recipe, path: str) -> list[tuple[Delta, float]]:
        return [(deltas[name][path], weight) for name, weight in recipe if path in deltas[name]]

    return {path: relative(terms(recipe, path), terms(folded, path), path) for path in paths}
