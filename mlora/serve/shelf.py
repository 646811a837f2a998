"""Adapters that are known by their files: read when asked for, and dropped when host memory has no more room."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import errors
from ..adapters.adapter import Adapter
from ..merge import as_merge
from ..routing.entries import BASE, Entry
from ..routing.registry import AdapterInfo
from ..runtime import Runtime


def names_of(entry: Entry) -> tuple[str, ...]:
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


def key_of(entry: Entry) -> Any:
    """Hashable, and equal for entries that say the same."""
    how = as_merge(entry)
    if how is not None:
        return "merge", how.label
    if isinstance(entry, Mapping):
        return frozenset(entry.items())
    return None if entry == BASE else entry


@dataclass
class _Record:
    """Where an adapter comes from. `bytes`: its size where it is loaded, else 0."""

    source: str | Path | Adapter
    options: Mapping[str, Any]
    bytes: int = 0
    reading: threading.Lock = field(default_factory=threading.Lock)


class Shelf:
    """The adapters that were registered by path. They are loaded into the runtime under their names, and deleted from
    it, so that those which are loaded take at most `most` bytes, or as many as are held at once; the one that was used
    longest ago goes first. Thread-safe.

    What the runtime has beside is not the shelf's, and stays.
    """

    def __init__(self, runtime: Runtime, most: int | None) -> None:
        self._runtime = runtime
        self._most = most
        self._records: dict[str, _Record] = {}
        self._loaded: OrderedDict[str, _Record] = OrderedDict()  # least recently used first
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()  # the runtime's may be taken under it
        self.used = 0  # bytes of those that are loaded
        self.loads = self.drops = 0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def source(self, name: str) -> str | None:
        """Where one that was registered comes from."""
        record = self._records.get(name)
        return None if record is None else str(record.source)

    def sources(self) -> dict[str, str]:
        """Of all that were registered."""
        with self._lock:
            return {name: str(record.source) for name, record in self._records.items()}

    def register(self, name: str, source: str | Path, options: Mapping[str, Any]) -> None:
        """Raises `DuplicateAdapterError` if the name is taken."""
        with self._lock:
            if name in self._records or self._runtime.adapter(name) is not None:
                raise errors.DuplicateAdapterError(f"an adapter {name!r} is registered already; delete it first")
            self._records[name] = _Record(source, options)

    def delete(self, name: str) -> bool:
        """Forget it, and delete it from the runtime when nothing uses it; False if it was not registered."""
        with self._lock:
            record = self._records.pop(name, None)
            if name in self._loaded:
                self._runtime.delete_adapter(name, when_unused=True)
                self._unload(name)
            return record is not None

    def replace(self, name: str, source: Any, options: Mapping[str, Any]) -> AdapterInfo:
        """Read another in its place. Raises what `Runtime.replace_adapter` does; then it is as it was."""
        record = self._records[name]
        with self._lock:
            self._held[name] += 1
        try:
            with record.reading:
                change = self._runtime.replace_adapter if record.bytes else self._load
                info = change(name, source, **options)
                with self._lock:
                    record.source, record.options = source, options
                    if record.bytes:
                        self._unload(name)
                    self._note(name, record, info)
            return info
        finally:
            self.let_go([name])

    def hold(self, names: Sequence[str], read: bool = True) -> bool:
        """Keep adapters until `let_go`, all of them or none; False where one has to be read, unless `read`: then it is,
        once however many ask.

        Raises what `Runtime.load_adapter` does.
        """
        with self._lock:
            missing = [
                (name, self._records[name]) for name in names if name in self._records and name not in self._loaded
            ]
            if missing and not read:
                return False
            self._held.update(names)
            for name in names:
                if name in self._loaded:
                    self._loaded.move_to_end(name)
        try:
            for name, record in missing:
                self._read(name, record)
        except BaseException:
            self.let_go(names)
            raise
        return True

    def let_go(self, names: Sequence[str]) -> None:
        """Undo one `hold` of the same names."""
        with self._lock:
            for name in names:
                self._held[name] -= 1
                if not self._held[name]:
                    del self._held[name]
            self._drop()

    def _read(self, name: str, record: _Record) -> None:
        with record.reading:
            if record.bytes:
                return
            info = self._load(name, record.source, **record.options)
            with self._lock:
                self.loads += 1
                if self._records.get(name) is not record:
                    self._runtime.delete_adapter(name)
                    raise errors.UnknownAdapterError(f"adapter {name!r} was deleted while it was read")
                self._note(name, record, info)
                self._drop()

    def _load(self, name: str, source: Any, **options: Any) -> AdapterInfo:
        if isinstance(source, Adapter):
            return self._runtime.add_adapter(name, source, **options)
        return self._runtime.load_adapter(source, name, **options)

    # Under the lock

    def _note(self, name: str, record: _Record, info: AdapterInfo) -> None:
        record.bytes = max(info.bytes, 1)
        self._loaded[name] = record
        self.used += record.bytes

    def _unload(self, name: str) -> None:
        record = self._loaded.pop(name)
        self.used -= record.bytes
        record.bytes = 0

    def _drop(self) -> None:
        """Down to `most` bytes."""
        if self._most is None or self.used <= self._most:
            return
        for name in list(self._loaded):
            if name not in self._held:
                with suppress(errors.AdapterInUseError):  # pinned, or set_adapter chose it
                    self._runtime.delete_adapter(name)
                    self._unload(name)
                    self.drops += 1
            if self.used <= self._most:
                return
