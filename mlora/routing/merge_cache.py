"""Merges in requests: computed once, and kept as adapters under their labels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from .. import errors
from ..merge import as_merge
from .registry import Registry
from .tiers import Tiers


class MergeCache:
    """The results of merges that entries asked for.

    Args:
        tiers: which loads what entries name.
        most: how many are kept, beside those in use.
        lock: the runtime's, see its `__init__`; reentrant.
    """

    def __init__(self, registry: Registry, tiers: Tiers, most: int, lock: threading.RLock) -> None:
        self._registry = registry
        self._tiers = tiers
        self._most = most
        self._labels: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._lock = lock
        self._computing = threading.Lock()  # never taken under the lock above

    @contextmanager
    def resolved(self, entries: Any) -> Iterator[Any]:
        """`entries` with every merge replaced by the name of its result, or by weights where it is a plain sum; with
        all adapters on the host, and under the lock, so that nothing is forgotten or dropped before it is pinned."""
        many = isinstance(entries, Sequence) and not isinstance(entries, str)
        with ExitStack() as held:
            while True:
                labels: set[str] = set()
                resolved = [self._without_merge(entry, labels) for entry in (entries if many else [entries])]
                with self._lock:
                    absent = self._tiers.absent(resolved)
                    if not absent and labels <= self._labels.keys():
                        for label in labels:
                            self._labels.move_to_end(label)
                        yield resolved if many else resolved[0]
                        return
                held.enter_context(self._tiers.holding(absent))

    def _without_merge(self, entry: Any, labels: set[str]) -> Any:
        """One entry of `resolved`; adds the name of a merge's result to `labels`."""
        how = as_merge(entry)
        if how is None:
            return entry
        how = how.canonical()
        if how.is_sum:
            weights: dict[str, float] = {}
            for name, weight in zip(how.adapters, how.weights, strict=True):
                weights[name] = weights.get(name, 0.0) + weight
            return weights
        with self._computing:  # once, also when several threads ask for it
            if how.label not in self._labels:
                self._registry.add_merge(how.label, how, self._labels)
        labels.add(how.label)
        return how.label

    def trim(self) -> None:
        """Down to `most` results, those that are in use aside. Called under the lock."""
        for label in list(self._labels)[: max(0, len(self._labels) - self._most)]:
            with suppress(errors.AdapterInUseError, errors.UnknownAdapterError):  # unknown: gone with one before it
                self._registry.remove(label)
