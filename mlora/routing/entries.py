"""What a user writes for each row, and what it means: entries -> recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from .. import errors
from ..merge import Merge, as_merge, is_weight
from ..plan.plan import Recipe
from .pin import Pinned

BASE = "__base__"

Entry: TypeAlias = str | Mapping[str, float] | Merge | Pinned | None
Entries: TypeAlias = Entry | Sequence[Entry]


def resolve_entry(entry: Any, key: Callable[[str], str | None]) -> Recipe:
    """Read one entry. `key`: of a name, under which the store has its adapter; None where there is none.

    Raises:
        EntryError: it is not a name, None or a mapping name -> finite number.
        UnknownAdapterError: it names an adapter that is not loaded.
    """
    if isinstance(entry, Pinned):
        return entry.recipe
    if entry is None or entry == BASE:
        return ()
    if isinstance(entry, str):
        entry = {entry: 1.0}
    if not isinstance(entry, Mapping):
        raise errors.EntryError(
            f"an entry of adapter_names is {entry!r} ({type(entry).__name__}); it must be an adapter's name, None, "
            f"{BASE!r}, a mapping name -> weight or an mlora.Merge"
        )
    recipe = []
    for name, weight in entry.items():
        own = key(name) if isinstance(name, str) else None
        if own is None:
            raise errors.UnknownAdapterError(name)
        if not is_weight(weight):
            raise errors.EntryError(f"the weight of adapter {name!r} is {weight!r}; it must be a finite number")
        if weight != 0:
            recipe.append((own, float(weight)))
    return tuple(sorted(recipe))


def names_of(entry: Any) -> tuple[str, ...]:
    """The adapters that an entry uses.

    Raises:
        EntryError, MergeError: it is no entry.
    """
    how = as_merge(entry)
    if how is not None:
        return how.adapters
    if entry is None or entry == BASE:
        return ()
    if isinstance(entry, str):
        return (entry,)
    if isinstance(entry, Mapping):
        return tuple(entry)
    raise errors.EntryError(f"an entry is {entry!r}; it must be an adapter's name, None, a mapping or an mlora.Merge")


def key_of(entry: Any) -> Any:
    """Hashable, and equal for entries that say the same."""
    how = as_merge(entry)
    if how is not None:
        return "merge", how.label
    if isinstance(entry, Mapping):
        return frozenset(entry.items())
    return None if entry == BASE else entry


def is_single(entries: Any) -> bool:
    """Whether `entries` is one entry for all rows, not one a row."""
    return entries is None or isinstance(entries, (str, Mapping, Merge, Pinned))


def resolve(entries: Any, key: Callable[[str], str | None]) -> list[Recipe]:
    """One recipe a row; a single entry gives one recipe. `key`: see `resolve_entry`."""
    if is_single(entries):
        return [resolve_entry(entries, key)]
    if not isinstance(entries, Sequence):
        raise errors.EntryError(
            f"adapter_names is {entries!r} ({type(entries).__name__}); it must be one entry or a list of one a row"
        )
    return [resolve_entry(entry, key) for entry in entries]


def check_lengths(lengths: Any, starts: Any) -> None:
    """Raise `EntryError` unless these are the `lengths` and `starts` of packed sequences."""
    if not isinstance(lengths, Sequence) or not lengths or not all(_is_count(length) for length in lengths):
        raise errors.EntryError(f"lengths is {lengths!r}; it must list how many tokens each sequence has, at least 1")
    if starts is not None and (
        not isinstance(starts, Sequence)
        or len(starts) != len(lengths)
        or not all(isinstance(own, Mapping) and all(map(_is_start, own.values())) for own in starts)
    ):
        raise errors.EntryError(
            f"starts is {starts!r}; it must have a mapping aLoRA -> index or None for each of {len(lengths)} sequences"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_start(value: Any) -> bool:
    return value is None or (isinstance(value, Integral) and not isinstance(value, bool))
