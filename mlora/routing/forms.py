"""Adapters that differ in their numbers alone, as those of one recipe of training do: what lowering and packing made of
one serves the others.

They have the same config and the same header, which tells where the numbers are. See `arena/form.py`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.header import InMemory, Place
from ..arena.form import Form, form_of
from ..arena.held import Held
from ..arena.store import Store
from .files import Read
from .info import AdapterInfo
from .registry import Content

_MOST = 1 << 15  # tensors of all forms, each of which takes less than a KB

# Options that name modules in any order: sets, which PEFT writes in the order of their hashes.
_SETS = ("target_modules", "exclude_modules")


@dataclass(frozen=True)
class _Known:
    """A form, and an adapter that has it, without its numbers. `places`: of its tensors in the file, by its keys."""

    form: Form
    adapter: Adapter
    info: AdapterInfo
    places: tuple[Place, ...]


class Forms:
    """The forms of adapters that were loaded last. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[tuple[Any, ...], _Known] = OrderedDict()  # that used longest ago first
        self._tensors = 0
        self._lock = threading.Lock()

    def find(self, name: str, read: Read, options: Mapping[str, Any]) -> Content | None:
        """What lowering and packing would make of what was read; None where its form is not known, or a value is not
        finite. `options`: of lowering.

        Raises:
            CapacityError: as `Store.pack`.
        """
        tensors, key = read.found.tensors, _key(read, options)
        with self._lock:
            if key is None or (known := self._known.get(key)) is None:
                return None
            self._known.move_to_end(key)
        assert isinstance(tensors, InMemory)  # what has a key
        form, dtype = known.form, self._store.dtype
        try:
            packed = self._store.fill(f"adapter {name!r}", lambda memory: form.pack(tensors.data, dtype, memory))
        except ValueError:  # which lowering tells more of
            return None
        exact = form.dtype is dtype
        own = Held(packed.blob, form.spans) if exact else InMemory(tensors.text, known.places, tensors.data)
        adapter = known.adapter.holding(own, config=read.found.config, source=read.source)
        info = replace(known.info, name=name, source=read.source, zero=form.is_zero(tensors.data))
        return Content(packed, adapter, info)

    def learn(self, read: Read, options: Mapping[str, Any], made: Content) -> bool:
        """Remember the form of what was made of files, without reading the base's weights; False where it has none."""
        tensors, key = read.found.tensors, _key(read, options)
        if key is None or made.adapter is None:
            return False
        assert isinstance(tensors, InMemory)  # what has a key
        form = form_of(made.packed, made.spans, tensors.places)
        if form is None:
            return False
        places = tuple(place._replace(key=own) for place, own in zip(tensors.places, form.spans, strict=True))
        with self._lock:
            if key not in self._known:
                self._known[key] = _Known(form, made.adapter.holding({}, config={}), made.info, places)
                self._tensors += len(places)
            while self._tensors > _MOST and len(self._known) > 1:
                _, gone = self._known.popitem(last=False)
                self._tensors -= len(gone.places)
        return True


def _key(read: Read, options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Equal where nothing but numbers differs; None of what may differ in more."""
    tensors = read.found.tensors
    if not isinstance(tensors, InMemory):
        return None
    config = dict(read.found.config)
    for option in _SETS:
        if isinstance(config.get(option), list) and all(isinstance(one, str) for one in config[option]):
            config[option] = sorted(config[option])
    return tensors.text, json.dumps(config), tuple(sorted(options.items()))
