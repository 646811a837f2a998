"""Where adapters are: on the host, or in files that are read when they are needed.

    files --load--> host --acquire--> device      by a call, or by a prefetch beside it
      ^-----drop-----'                            what was used longest ago, when `host_memory` is short

What is on the device is on the host too. What has no files, because it was made in memory, stays.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from .. import errors
from ..arena.held import Held
from ..arena.store import Store
from ..folding.fold import Folded
from ..lowering import Lowered
from ..lowering.reads import noting
from .entries import is_single
from .files import Files, Read, Seen
from .forms import Forms
from .info import AdapterInfo, HostUse
from .kept import Kept
from .registry import Content, Loaded, Registry

_TOLD = 8  # names in a message


class Tiers:
    """Loads adapters from their files, and drops them.

    Args:
        kept: packed adapters on disk, if there is such a cache.
        folded: what is in the weights, and so cannot be dropped.
        lock: the runtime's, see its `__init__`; reentrant. Files are read and lowered without it.
    """

    def __init__(
        self, registry: Registry, store: Store, kept: Kept | None, folded: Folded, lock: threading.RLock
    ) -> None:
        self._registry = registry
        self._store = store
        self._forms = Forms(store)
        self._kept = kept
        self._folded = folded
        self._lock = lock
        self._flights: dict[Files, threading.Event] = {}  # what is being loaded; set when that has ended
        self._held: Counter[str] = Counter()  # names of what is not dropped
        self._loads = self._drops = 0
        store.host.make_room = self._make_room

    @property
    def use(self) -> HostUse:
        host, registry = self._store.host, self._registry
        with self._lock:
            return HostUse(host.used, host.most, len(registry), registry.loaded, self._loads, self._drops)

    def load(self, name: str, files: Files, *, known: bool = False, replaces: bool = False) -> AdapterInfo:
        """Read an adapter and register it, in place of one that has its name if it `replaces` it. One that is `known`
        is registered with these files already.

        Raises:
            AdapterError, UnsupportedAdapterError: as `Runtime.load_adapter`, which tells all it may raise.
            UnknownAdapterError: it is not known any more.
        """
        content, read, plain = self._content(name, files)

        def seen(key: str, number: int, info: AdapterInfo) -> Seen:
            return Seen(read.path, read.mark, key, number, info, plain)

        first, options = files.seen is None, files.lowering
        info = self._registry.enter(
            name, content, options.get("approximate"), options.get("dense", False), replaces=replaces, files=files,
            seen=seen, known=known,
        )  # fmt: skip
        if first and (remark := Lowered({}, info.missing, info.unused).remark):
            warnings.warn(f"adapter {name!r} from {info.source}: {remark}", stacklevel=3)
        return info

    def _content(self, name: str, files: Files) -> tuple[Content, Read, bool]:
        """Packed; what was read; and whether a blob is no more than the files are."""
        registry, kept, forms, options = self._registry, self._kept, self._forms, files.lowering
        bounded = self._store.host.most is not None
        read = files.read(name, again=bounded or kept is not None)
        plain = files.seen is not None and files.seen.plain
        if (found := forms.find(name, read, options)) is not None:
            return _bounded(found) if bounded else found, read, True
        if kept is not None and not plain and (found := kept.find(name, read, files.options)) is not None:
            return found, read, False
        with noting() as reads:
            adapter = registry.own_part(read.adapter)
            content = registry.content(name, adapter, registry.lowered(adapter, **options))
        own = adapter is read.adapter and not reads
        plain = own and (forms.learn(read, options, content) or _is_held(content))
        if kept is not None and not plain:
            kept.keep(read, files.options, content, reads)
        return _bounded(content) if bounded else content, read, plain

    # What is needed

    def absent(self, entries: Any) -> list[str]:
        """The adapters of entries without merges that are known by their files, and not on the host. What is no entry
        has none."""
        found: dict[str, None] = {}
        for entry in [entries] if is_single(entries) else entries if isinstance(entries, Sequence) else ():
            names = (entry,) if isinstance(entry, str) else entry if isinstance(entry, Mapping) else ()
            found.update((name, None) for name in names if self._registry.files(name) is not None)
        return list(found)

    @contextmanager
    def holding(self, names: Sequence[str]) -> Iterator[None]:
        """None of these is dropped inside; those that are on the host are when it begins."""
        with self._lock:
            self._held.update(names)
        try:
            for name in names:
                self._bring(name)
            yield
        finally:
            with self._lock:
                for name in names:
                    self._held[name] -= 1
                    if not self._held[name]:
                        del self._held[name]

    def _bring(self, name: str) -> None:
        """Load one that is known by its files. Of several that ask at once, one does, and the others wait for it; where
        it fails, each tries for itself. Not called under the lock."""
        while True:
            with self._lock:
                files = self._registry.files(name)
                if files is None:
                    return
                flight = self._flights.get(files)
                own = self._flights[files] = threading.Event() if flight is None else flight
            if flight is not None:
                flight.wait()
                continue
            try:
                with suppress(errors.UnknownAdapterError):  # another look tells whether it was replaced
                    self.load(name, files, known=True)
                    with self._lock:
                        self._loads += 1
            except errors.AdapterError as error:
                raise type(error)(f"adapter {name!r} cannot be loaded: {error}") from error
            finally:
                with self._lock:
                    del self._flights[files]
                own.set()

    # What goes

    def _make_room(self, nbytes: int, label: str) -> None:
        """See `Host`."""
        most = self._store.host.most or 0
        with self._lock:
            if nbytes <= most and self._drop():
                return
            there = self._registry.on_host()
            staying = [f"{name!r} ({why})" for name, one in there.items() if (why := self._stays(name, one))]
        told = ", ".join(staying[:_TOLD]) + (f" and {len(staying) - _TOLD} more" if len(staying) > _TOLD else "")
        raise errors.CapacityError(
            f"{label} needs {nbytes:,} bytes on the host; there are {most:,} (patch(host_memory=...))"
            + (f", and these cannot be dropped: {told}" if staying else "")
        )

    def _drop(self) -> bool:
        """Drop what was used longest ago; False where nothing can go. Under the lock."""
        for key in self._store.idle():
            loaded = self._registry.by_key(key)
            if loaded is not None and not self._stays(loaded.info.name, loaded):
                with suppress(errors.AdapterInUseError):  # something that was made of it is used
                    self._registry.drop(loaded.info.name, loaded)
                    self._drops += 1
                    return True
        return False

    def _stays(self, name: str, loaded: Loaded) -> str:
        """Why it cannot be dropped; "" where it can."""
        packed = self._store[loaded.key]
        if packed.pins or self._held[name]:
            return f"{packed.held:,} bytes, in use"
        if loaded.key in dict(self._folded.recipe):
            return f"{packed.held:,} bytes, folded into the weights"
        return "" if loaded.files is not None or loaded.group is not None else f"{packed.held:,} bytes, of no files"


def _is_held(content: Content) -> bool:
    """Whether its tensors lie in its blob."""
    return content.adapter is not None and isinstance(content.adapter.tensors, Held)


def _bounded(content: Content) -> Content:
    """As it is kept where host memory is bounded: without tensors that lie elsewhere, which are read again."""
    return content if _is_held(content) else replace(content, adapter=None)
