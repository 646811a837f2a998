"""The adapters of one patched model, by name: what is known of each, and its blob in the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NoReturn

import numpy as np
from torch import nn

from .. import errors
from ..adapters.adapter import Adapter
from ..adapters.on_disk import OnDisk
from ..arena.bits import INPUT, TAIL, TURN
from ..arena.held import Span, beside, spans_of, tensors_in
from ..arena.pack import Packed
from ..arena.store import Store
from ..folding.fold import Folded
from ..gradients.trained import Trained
from ..lowering import BaseLinear, Delta, Lowered, Names, lower, lower_own, own_parts, part_of, to_adapter, untouched
from ..lowering.delta import kernel_major
from ..merge import Merge, kept, merge_adapters
from ..plan.plan import Recipe
from ..plan.shared import Shared
from .entries import BASE, resolve
from .files import Files, Seen
from .info import AdapterInfo, same_tuple
from .ranks import Ranks

_TOLD = 20  # names in a message


@dataclass(frozen=True)
class Loaded:
    """An adapter of the registry that is on the host.

    Args:
        adapter: None of one whose tensors are read from its files when they are asked for.
        key: under which the store has its blob: its name, where that was free there.
        approximate, dense: what `lower` was given of its deltas of full rank.
        sources: of one that mlora made, not the user: the adapters that it was made of, with any of which it goes.
        group: of such a one: the names of its kind, of which it is one as long as it is loaded.
        files: of one that can be dropped, what makes it again.
    """

    adapter: Adapter | None
    info: AdapterInfo
    key: str
    approximate: int | None = None
    dense: bool = False
    sources: Sequence[str] = ()
    group: MutableMapping[str, None] | None = None
    files: Files | None = None


@dataclass(frozen=True)
class Content:
    """An adapter that is packed, and counts on the host, before it has its name. `adapter`, `info`: as in `Loaded`.
    `spans`: of its tensors, see `spans_of`."""

    packed: Packed
    adapter: Adapter | None
    info: AdapterInfo
    spans: Mapping[str, Span] = field(default_factory=dict)


class Registry:
    """Name -> `Loaded`, or `Files` where it is not on the host. Each `Loaded` has its blob in the store under its key,
    which recipes name. A name may get another content while pins still hold the old one there.

    Args:
        model: the patched one; store, shared: its own. `folded`: what is in its weights, and so cannot go.
        bases: dotted path -> what an adapter can change. `indices`: -> its number in the store; `shards`: -> that of
            its rank rows, where processes share them out.
        encoder: whether a part of the model reads other tokens than input_ids.
        lock: the runtime's, see its `__init__`; reentrant.
        ranks: the processes that the model is split over; None where it is not.

    Lowering and packing, which take long, are done without the lock.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        shared: Shared,
        folded: Folded,
        bases: Mapping[str, BaseLinear],
        indices: Mapping[str, int],
        shards: Mapping[str, int],
        encoder: bool,
        lock: threading.RLock,
        ranks: Ranks | None = None,
    ) -> None:
        self.bases = bases
        self._ranks = ranks
        self._model = model
        self.paths = {index: path for numbers in (indices, shards) for path, index in numbers.items()}
        self._indices, self._shards = indices, shards
        self._store = store
        self._shared = shared
        self._folded = folded
        self._encoder = encoder
        self._adapters: dict[str, Loaded | Files] = {}
        self._names: dict[str, str] = {}  # by the keys of those that are loaded
        self._made: dict[str, Loaded] = {}  # those with `sources`
        self._lock = lock

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __getitem__(self, name: str) -> Loaded | Files:
        """Raises `UnknownAdapterError` where there is none."""
        one = self._adapters.get(name)
        if one is None:
            self._refuse_unknown(name)
        return one

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def loaded(self) -> int:
        """How many are on the host."""
        return len(self._names)

    def by_key(self, key: str) -> Loaded | None:
        """What the store has under `key`; None if its name is gone, or another's by now."""
        one = self._adapters.get(self._names.get(key, ""))
        return one if isinstance(one, Loaded) and one.key == key else None

    def key(self, name: str) -> str | None:
        """Of a name; None where nothing is loaded under it."""
        one = self._adapters.get(name)
        return one.key if isinstance(one, Loaded) else None

    def files(self, name: str) -> Files | None:
        """Of one that is not on the host."""
        one = self._adapters.get(name)
        return one if isinstance(one, Files) else None

    def packed(self, name: str) -> Packed | None:
        """What the store has of it, if it is on the host; raises as `[]`."""
        with self._lock:
            one = self[name]
            return self._store[one.key] if isinstance(one, Loaded) else None

    def info(self, name: str) -> AdapterInfo:
        """What is known of it now."""
        with self._lock:
            one = self[name]
            if isinstance(one, Files):
                seen = one.seen
                return AdapterInfo(name, one.source, "", "", 0, (), (), 0, "files") if seen is None else seen.info
            info, packed = one.info, self._store[one.key]
        zero = info.zero if not isinstance(packed.source, Trained) else packed.source.is_zero
        return replace(info, zero=zero, location="device" if packed.resident else "host")

    def infos(self) -> dict[str, AdapterInfo]:
        """Of all adapters, in the order of loading."""
        with self._lock:
            return {name: self.info(name) for name in self._adapters}

    def together(self, what: str) -> AbstractContextManager[None]:
        """Of the processes that the model is split over, see `Ranks.together`; nothing where it is not."""
        return nullcontext() if self._ranks is None else self._ranks.together(what)

    def sources(self) -> dict[str, str]:
        """Where each comes from, of those that users gave a name."""
        with self._lock:
            of_all = {n: one.source if isinstance(one, Files) else one.info.source for n, one in self._adapters.items()}
            return {name: source for name, source in of_all.items() if name not in self._made}

    def adapter(self, name: str) -> Adapter:
        """Its config and tensors, read again where they are not in memory.

        Raises:
            UnknownAdapterError: there is none of that name. AdapterError: its files are not what they were.
        """
        return self._adapter(name, self[name])

    def lower(self, name: str, one: Loaded | Files) -> dict[str, Delta]:
        """Its deltas, dotted path -> delta, of the whole modules. `one`: what the registry has, or had, under `name`;
        raises as `adapter`."""
        options: dict[str, Any] = (
            {"approximate": one.approximate, "dense": one.dense} if isinstance(one, Loaded) else one.lowering
        )
        approximate, dense = options.get("approximate"), options.get("dense", False)
        return dict(lower(self._adapter(name, one), self.bases, approximate, dense=dense, model=self._model).deltas)

    def _adapter(self, name: str, one: Loaded | Files) -> Adapter:
        if isinstance(one, Loaded) and one.adapter is not None:
            return one.adapter
        files = one.files if isinstance(one, Loaded) else one
        assert files is not None  # one of them is there
        return self.own_part(files.read(name).adapter)

    def own_part(self, adapter: Adapter) -> Adapter:
        """What of it is for this model, as an adapter of the base as it is."""
        names = Names(self._model, self.bases)
        return untouched(part_of(adapter, names), names)

    def lowered(
        self, adapter: Adapter, approximate: int | None = None, dense: bool = False, **options: bool
    ) -> Lowered:
        """What `lower_own` makes of its own part; `options`: of that."""
        return lower_own(adapter, self.bases, approximate, dense=dense, model=self._model, **options)

    def recipes(self, entries: Any) -> list[Recipe]:
        """One a row of entries without merges; a single entry gives one.

        Raises:
            EntryError, UnknownAdapterError: one of them is no entry, or names no adapter.
        """
        try:
            return resolve(entries, self.key)
        except errors.UnknownAdapterError as error:
            self._refuse_unknown(error.args[0])

    def check_new(self, name: Any) -> None:
        """Raise `EntryError` if `name` cannot name an adapter, `DuplicateAdapterError` if it does."""
        if not isinstance(name, str) or not name or name == BASE:
            raise errors.EntryError(
                f"{name!r} cannot name an adapter: it must be a string other than '' and '__base__'"
            )
        if (one := self._adapters.get(name)) is not None:
            how, source = ("registered", one.source) if isinstance(one, Files) else ("loaded", one.info.source)
            raise errors.DuplicateAdapterError(f"an adapter {name!r} is {how} already, from {source}; delete it first")

    def _refuse_unknown(self, name: Any) -> NoReturn:
        known = ", ".join(map(repr, islice(self._adapters, _TOLD))) or "none"
        more = f" and {len(self._adapters) - _TOLD:,} more" if len(self._adapters) > _TOLD else ""
        raise errors.UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {known}{more}") from None

    def register(self, adapters: Mapping[str, Files]) -> None:
        """Make adapters known that are loaded when they are needed: all of them or none. Raises as `check_new`."""
        with self._lock:
            for name in adapters:
                self.check_new(name)
            self._adapters.update(adapters)

    def add(
        self,
        name: str,
        adapter: Adapter,
        lowered: Lowered,
        approximate: int | None = None,
        dense: bool = False,
        sources: Sequence[str] = (),
        group: MutableMapping[str, None] | None = None,
        replaces: bool = False,
        trainable: bool = False,
    ) -> AdapterInfo:
        """Register an adapter, or with `replaces` another content of its name, whose numbers will change if it is
        `trainable`. For the other arguments see `Loaded`.

        Raises:
            DuplicateAdapterError: the name is taken; UnknownAdapterError, AdapterInUseError: of one that cannot be
                replaced, as `remove`. AdapterError, UnsupportedAdapterError: it does not fit the model.
            CapacityError: it is larger than the whole arena.
        """
        content = self.content(name, adapter, lowered, trainable, sources)
        return self.enter(name, content, approximate, dense, sources, group, replaces=replaces)

    def content(
        self, name: str, adapter: Adapter, lowered: Lowered, trainable: bool = False, sources: Sequence[str] = ()
    ) -> Content:
        """Pack an adapter; see `add`, also for what it raises. `enter` registers it, or `Store.discard` gives it up."""
        deltas = lowered.deltas
        with self.together(f"add adapter {name!r}"):
            packed, spans = self._pack(name, deltas, adapter, trainable)
            if not isinstance(adapter.tensors, OnDisk):
                adapter = adapter.holding(tensors_in(packed, spans, adapter.tensors))
        ranks = tuple(sorted({delta.rank // (self.bases[path].own_experts or 1) for path, delta in deltas.items()}))
        info = AdapterInfo(
            name, adapter.source, adapter.peft_type, _variant(adapter), ranks[-1], ranks, same_tuple(tuple(deltas)),
            packed.nbytes, "host", {path: delta.error for path, delta in deltas.items() if delta.error},
            {
                path: self._store.nbytes(delta.matrix, self._indices[path])
                for path, delta in deltas.items()
                if delta.matrix is not None
            },
            lowered.missing, lowered.unused, all(delta.is_zero for delta in deltas.values()), adapter.ignored,
            tuple(sources),
        )  # fmt: skip
        return Content(packed, adapter, info, spans)

    def enter(
        self,
        name: str,
        content: Content,
        approximate: int | None = None,
        dense: bool = False,
        sources: Sequence[str] = (),
        group: MutableMapping[str, None] | None = None,
        *,
        replaces: bool = False,
        files: Files | None = None,
        seen: Callable[[str, int, AdapterInfo], Seen] | None = None,
        known: bool = False,
    ) -> AdapterInfo:
        """Register what was packed; it is discarded if that fails. Raises as `add` does.

        Args:
            files: of one that can be dropped. `seen`: makes what is known of them of its key, number and info.
            known: whether the name has to have these files; raises `UnknownAdapterError` where it has not any more.
        """
        packed, info = content.packed, content.info
        before = files.seen if files is not None else None
        with self._lock, ExitStack() as undone:
            undone.callback(self._store.discard, packed)
            if known and self._adapters.get(name) is not files:
                raise errors.UnknownAdapterError(f"adapter {name!r} was deleted or replaced while it was read")
            if content.adapter is not None and self._store.host.most is not None:
                self._store.keep(packed, beside(packed, content.adapter.tensors), f"adapter {name!r}")
            if replaces:
                self.remove(name, when_unused=True, replaced=True)
            elif not known:
                self.check_new(name)  # another thread may have taken the name meanwhile
            self._note(packed)
            key = name if before is None else before.key
            while key in self._store:  # what it was is pinned still
                key = f"{name} ({self._store.registered + 1})"
            self._store.register(key, packed, 0 if before is None else before.number)
            undone.pop_all()
            if files is not None and seen is not None:
                files.seen = seen(key, packed.number, replace(info, location="files"))
            loaded = Loaded(content.adapter, info, key, approximate, dense, sources, group, files)
            self._adapters[name] = loaded
            self._names[key] = name
            if sources:
                self._made[name] = loaded
            if group is not None:
                group[name] = None
            return self.info(name)

    def add_merge(self, name: str, how: Merge, group: MutableMapping[str, None] | None = None) -> AdapterInfo:
        """Register what `how` makes of its adapters: the user's, or one of a `group` that goes with them.

        Raises:
            UnknownAdapterError: one of them is not loaded. MergeError: they do not merge. Others: as `add`.
        """
        how = how.canonical()
        if group is not None:
            self.check_settled(filter(None, map(self.key, how.adapters)), "a merge of it that is kept")
        with self.together(f"merge {how.label}"):  # what follows may take all processes
            sources = {source: self[source] for source in how.adapters}
        with self.together(f"add {how.label}"):
            lowered = [self.lower(source, sources[source]) for source in how.adapters]
            deltas = kept(dict(merge_adapters(lowered, how, self.bases)), self.bases)
            adapter = to_adapter(deltas, how.label, self.bases)
            own = Lowered(own_parts(deltas, self.bases))
        return self.add(name, adapter, own, sources=() if group is None else how.adapters, group=group)

    def remove(self, name: str, *, when_unused: bool = False, replaced: bool = False) -> None:
        """Forget an adapter, and those that were made of it: with `when_unused` the name of one that calls or pins use,
        and the rest with the last of them. The name of one that is `replaced` is never gone to those who look without
        the lock: the caller, who holds it, gives it another content.

        Raises:
            UnknownAdapterError: there is none of that name. AdapterInUseError: it is used, or is the default.
        """
        with self._lock:
            going = [name, *self._made_of(name)]
            for one in going:
                self._check_unused(one, name, when_unused)
            for one in going:
                loaded = self._adapters[one] if replaced and one == name else self._adapters.pop(one)
                self._made.pop(one, None)
                if isinstance(loaded, Files):
                    continue
                self._names.pop(loaded.key)
                self._store.unregister(loaded.key)
                if loaded.group is not None:
                    del loaded.group[one]

    def _made_of(self, name: str) -> list[str]:
        """The names of what was made of it."""
        self[name]  # which raises where there is none
        made = [label for label, other in self._made.items() if name in other.sources]
        return list(dict.fromkeys(label for one in made for label in (one, *self._made_of(one))))

    def _check_unused(self, one: str, name: str, when_unused: bool) -> None:
        """Raise `AdapterInUseError` where `one`, which goes with `name`, has to stay."""
        key, what = self.key(one), "" if one == name else f", of which {one!r} was made"
        if key is None:  # only its files are there
            return
        if key in dict(self._folded.recipe):
            how = "it is folded into the weights; unmerge_adapter first"
        elif (default := self._shared.default) is not None and key in default.names:
            how = "set_adapter chose it; call set_adapter(None) first"
        elif self._store[key].pins and not when_unused:
            how = "a running call, an open use_adapters or a pin uses it"
        else:
            return
        raise errors.AdapterInUseError(f"adapter {name!r}{what} cannot go: {how}")

    def hold(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter's tensors in other memory: its parameters, as they are trained."""
        loaded = self._adapters[name]
        assert isinstance(loaded, Loaded)  # it has parameters
        self._adapters[name] = replace(loaded, adapter=adapter)

    def on_host(self) -> dict[str, Loaded]:
        """Those that are there."""
        return {name: one for name, one in self._adapters.items() if isinstance(one, Loaded)}

    def drop(self, name: str, loaded: Loaded) -> None:
        """Give up the blob of one that nothing uses: it is known by its files again, or gone where it has none. Called
        under the lock; raises as `remove` where that is needed."""
        if loaded.files is None:
            self.remove(name)
        else:
            self._adapters[name] = loaded.files
            del self._names[loaded.key]
            self._store.unregister(loaded.key)

    def check_settled(self, keys: Iterable[str], what: str) -> None:
        """Raise `MergeError` where the store has an adapter under one of `keys` that is being trained: `what` would be
        out of date at once."""
        for key in keys:
            source = self._store[key].source if key in self._store else None
            if isinstance(source, Trained) and source.training:
                raise errors.MergeError(
                    f"adapter {key!r} is being trained, so that {what} would soon be out of date: "
                    f"set_requires_grad({key!r}, False) first, or merge a copy of it as it is (add_weighted_adapter)"
                )

    def forget_made_of(self, name: str) -> None:
        """Forget what was made of an adapter that will be trained; raises `AdapterInUseError` where that is used, or
        the adapter is folded in."""
        with self._lock:
            if self.key(name) in dict(self._folded.recipe):
                raise errors.AdapterInUseError(
                    f"adapter {name!r} cannot be trained: it is folded into the weights; unmerge_adapter first"
                )
            for made in self._made_of(name):
                if made in self._adapters:  # not gone already, with another of them
                    self.remove(made)

    def _pack(
        self, name: str, deltas: Mapping[str, Delta], adapter: Adapter, trainable: bool
    ) -> tuple[Packed, Mapping[str, Span]]:
        """The blob, and where tensors of the adapter's lie in it."""
        by_index: dict[int, Delta] = {}
        for path, delta in deltas.items():
            parts = {self._indices[path]: kernel_major(delta, self.bases[path])}
            if delta.sharded:
                rows, rest = delta.apart()
                parts = {self._shards[path]: rows, **({} if rest.is_empty else {self._indices[path]: rest})}
            for index, part in parts.items():
                other = by_index.setdefault(index, part)
                if other is not part and not other.equals(part):
                    raise errors.AdapterError(
                        f"adapter {name!r}: it has different weights for one shared module under several of its "
                        f"names: {', '.join(sorted({path, *self.bases[path].aliases} & deltas.keys()))}"
                    )
        packed = self._store.pack(by_index, f"adapter {name!r}", trainable)
        if packed.invocation and self._encoder:
            raise errors.UnsupportedAdapterError(
                f"adapter {name!r}: option alora_invocation_tokens is not served on a model with an encoder, "
                f"whose decoder reads other tokens than input_ids"
            )
        return packed, {} if isinstance(adapter.tensors, OnDisk) else spans_of(packed, by_index, adapter.tensors)

    def _note(self, packed: Packed) -> None:
        """Tell compiled code which ops it needs from now on; each is one compilation more, once."""
        shared = self._shared
        touched = [self.bases[self.paths[index]] for index in np.flatnonzero(packed.touches).tolist()]
        shared.inputs |= bool((packed.touches & INPUT).any())
        shared.turns |= bool((packed.touches & TURN).any())
        shared.norms |= any(base.offset is not None for base in touched)
        shared.embeddings |= any(base.embed_scale is not None for base in touched)
        shared.experts |= any(base.experts for base in touched)
        shared.heads = shared.heads.union(packed.heads)
        shared.tails = shared.tails.union(np.flatnonzero(packed.touches & TAIL).tolist())


def _variant(adapter: Adapter) -> str:
    config = adapter.config
    if config.get("use_dora"):
        return "DoRA"
    if config.get("alora_invocation_tokens"):
        return "aLoRA"
    return "rsLoRA" if config.get("use_rslora") else ""
