"""`MergeCache` by itself: over a registry that merges nothing."""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any

import pytest

from mlora import Merge, errors
from mlora.routing.merge_cache import MergeCache


class Registry:
    """Keeps the names of what it was asked to make."""

    def __init__(self) -> None:
        self.groups: dict[str, MutableMapping[str, None]] = {}
        self.made: list[str] = []
        self.used: set[str] = set()

    def add_merge(self, name: str, how: Merge, group: MutableMapping[str, None]) -> None:
        self.made.append(name)
        self.groups[name] = group
        group[name] = None

    def remove(self, name: str) -> None:
        if name in self.used:
            raise errors.AdapterInUseError(name)
        del self.groups.pop(name)[name]


class There:
    """Tiers of which all is on the host."""

    def absent(self, entries: Any) -> list[str]:
        return []

    def holding(self, names: list[str]) -> Any:
        return nullcontext()


@pytest.fixture
def registry() -> Registry:
    return Registry()


def cache_of(registry: Any, most: int) -> MergeCache:
    return MergeCache(registry, There(), most, threading.RLock())  # type: ignore[arg-type]


def ask(cache: MergeCache, entries: Any) -> Any:
    with cache.resolved(entries) as resolved:
        cache.trim()
        return resolved


def pruned(density: float) -> Merge:
    return Merge(["b", "a"], [2, 1], "magnitude_prune", density=density)


@pytest.mark.parametrize("entries", [None, "a", {"a": 0.5}, [], ["a", None, {"a": 1.0, "b": 2.0}], 5])
def test_what_is_no_merge_stays(registry: Registry, entries: Any) -> None:
    assert ask(cache_of(registry, 1), entries) == entries
    assert not registry.made


def test_a_sum_is_weights_and_computes_nothing(registry: Registry) -> None:
    entry = Merge(["b", "a", "a"], [2, 1, 1], normalize=True)
    assert ask(cache_of(registry, 1), [entry, None]) == [{"a": 0.5, "b": 0.5}, None]
    assert not registry.made


def test_equal_merges_are_one_result(registry: Registry) -> None:
    cache, label = cache_of(registry, 1), pruned(0.5).label
    as_json = {"ids": ["a", "b"], "weights": [1, 2], "merge_strategy": "magnitude_prune", "density": 0.5}
    assert ask(cache, [pruned(0.5), "a", as_json]) == [label, "a", label]
    assert ask(cache, pruned(0.5)) == label
    assert registry.made == [label]


def test_those_used_longest_ago_go_first_and_those_in_use_stay(registry: Registry) -> None:
    cache, labels = cache_of(registry, 2), [pruned(density).label for density in (0.1, 0.2, 0.3, 0.4)]
    for density in (0.1, 0.2, 0.1, 0.3):
        ask(cache, pruned(density))
    assert list(registry.groups) == [labels[0], labels[2]]
    registry.used.add(labels[0])
    ask(cache, pruned(0.4))
    assert set(registry.groups) == {labels[0], labels[2], labels[3]}
    ask(cache, [pruned(0.3), pruned(0.4)])
    assert set(registry.groups) == {labels[0], labels[2], labels[3]}


def test_a_result_that_goes_before_it_is_named_is_made_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does whose source another thread deletes."""
    cache, label, add = cache_of(registry, 1), pruned(0.5).label, registry.add_merge

    def short_lived(*args: Any) -> None:
        add(*args)
        if len(registry.made) == 1:
            registry.remove(label)

    monkeypatch.setattr(registry, "add_merge", short_lived)
    assert ask(cache, pruned(0.5)) == label
    assert registry.made == [label, label]
