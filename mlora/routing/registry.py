"""The adapters of one patched model, by name: what is known of each, and its blob in the store."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from torch import nn

from .. import errors
from ..adapters.adapter import Adapter
from ..adapters.on_disk import OnDisk
from ..arena.bits import INPUT, TAIL, TURN
from ..arena.pack import Packed, tensors_in
from ..arena.store import Store
from ..folding.fold import Folded
from ..gradients.trained import Trained
from ..lowering import BaseLinear, Delta, Lowered, lower, own_parts, to_adapter
from ..lowering.delta import kernel_major
from ..merge import Merge, kept, merge_adapters
from ..plan.plan import Recipe
from ..plan.shared import Shared
from .entries import BASE, resolve
from .ranks import Ranks


@dataclass(frozen=True)
class AdapterInfo:
    """What `Runtime.adapters` tells of an adapter.

    Args:
        name: as given to `load_adapter`. `source`: folder, hub id or "memory".
        peft_type: PEFT's type, e.g. "LORA". `variant`: "DoRA", "rsLoRA", ..., or "".
        rank: the largest rank of any module; `ranks`: all ranks, sorted.
        modules: dotted paths of the modules that it changes.
        bytes: its size on the device.
        location: "device" or "host".
        errors: module -> |D - D'| / |D| (Frobenius), for each whose delta D is approximated by D'; empty
            where all is exact.
        dense: module -> bytes on the device, for each whose delta is a whole matrix, as large as the weight.
        missing: dotted paths of what its config targets and its files have nothing for: the base there, as in PEFT.
        unused: what its files call modules that the model does not have and does without.
        zero: whether its delta is zero, so that it changes nothing: never trained, scaled by 0, or a merge to nothing.
        ignored: what its files hold beside: config fields and tensors that `ignore` named, and parts of other models
            (`lora_te_*`).
        made_of: of one that a request's merge made, or what is folded in: the adapters, with any of which it goes.
    """

    name: str
    source: str
    peft_type: str
    variant: str
    rank: int
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    bytes: int
    location: str
    errors: Mapping[str, float] = field(default_factory=dict)
    dense: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    zero: bool = False
    ignored: tuple[str, ...] = ()
    made_of: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest of `errors`; 0 where all is exact."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class Loaded:
    """An adapter of the registry.

    Args:
        key: under which the store has its blob: its name, where that was free there.
        approximate, dense: what `lower` was given of its deltas of full rank.
        sources: of one that mlora made, not the user: the adapters that it was made of, with any of which it goes.
        group: of such a one: the names of its kind, of which it is one as long as it is loaded.
    """

    adapter: Adapter
    info: AdapterInfo
    key: str
    approximate: int | None = None
    dense: bool = False
    sources: Sequence[str] = ()
    group: MutableMapping[str, None] | None = None


class Registry:
    """Name -> `Loaded`; each has its blob in the store under its key, which recipes name. A name may get another
    content while pins still hold the old one there.

    Args:
        model: the patched one; store, shared: its own. `folded`: what is in its weights, and so cannot go.
        bases: dotted path -> what an adapter can change. `indices`: -> its number in the store.
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
        encoder: bool,
        lock: threading.RLock,
        ranks: Ranks | None = None,
    ) -> None:
        self.bases = bases
        self._ranks = ranks
        self._model = model
        self.paths = {index: path for path, index in indices.items()}
        self._indices = indices
        self._store = store
        self._shared = shared
        self._folded = folded
        self._encoder = encoder
        self._loaded: dict[str, Loaded] = {}
        self._lock = lock

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def __getitem__(self, name: str) -> Loaded:
        """Raises `UnknownAdapterError` where there is none."""
        loaded = self._loaded.get(name)
        if loaded is None:
            self._refuse_unknown(name)
        return loaded

    def by_key(self, key: str) -> Loaded | None:
        """What the store has under `key`; None if its name is gone, or another's by now."""
        return next((loaded for loaded in self._loaded.values() if loaded.key == key), None)

    def key(self, name: str) -> str | None:
        """Of a name; None where nothing is loaded under it."""
        loaded = self._loaded.get(name)
        return None if loaded is None else loaded.key

    def info(self, name: str) -> AdapterInfo:
        """What is known of it now."""
        loaded = self[name]
        info, packed = loaded.info, self._store[loaded.key]
        zero = info.zero if not isinstance(packed.source, Trained) else packed.source.is_zero
        return replace(info, zero=zero, location="device" if packed.resident else "host")

    def infos(self) -> dict[str, AdapterInfo]:
        """Of all adapters, in the order of loading."""
        with self._lock:
            return {name: self.info(name) for name in self._loaded}

    def together(self, what: str) -> AbstractContextManager[None]:
        """Of the processes that the model is split over, see `Ranks.together`; nothing where it is not."""
        return nullcontext() if self._ranks is None else self._ranks.together(what)

    def lower(self, loaded: Loaded) -> dict[str, Delta]:
        """Its deltas, dotted path -> delta, of the whole modules."""
        approximate, dense = loaded.approximate, loaded.dense
        return dict(lower(loaded.adapter, self.bases, approximate, dense=dense, model=self._model).deltas)

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
        if name in self._loaded:
            raise errors.DuplicateAdapterError(
                f"an adapter {name!r} is loaded already, from {self._loaded[name].info.source}; delete it first"
            )

    def _refuse_unknown(self, name: Any) -> NoReturn:
        known = ", ".join(map(repr, self._loaded)) or "none"
        raise errors.UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {known}") from None

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
        deltas = lowered.deltas
        with self.together(f"add adapter {name!r}"):
            packed, adapter = self._pack(name, deltas, adapter, trainable)
        ranks = tuple(sorted({delta.rank // (self.bases[path].own_experts or 1) for path, delta in deltas.items()}))
        info = AdapterInfo(
            name, adapter.source, adapter.peft_type, _variant(adapter), ranks[-1], ranks, tuple(deltas),
            packed.nbytes, "host", {path: delta.error for path, delta in deltas.items() if delta.error},
            {
                path: self._store.nbytes(delta.matrix, self._indices[path])
                for path, delta in deltas.items()
                if delta.matrix is not None
            },
            lowered.missing, lowered.unused, all(delta.is_zero for delta in deltas.values()), adapter.ignored,
            tuple(sources),
        )  # fmt: skip
        with self._lock:
            if replaces:
                self.remove(name, when_unused=True)
            self.check_new(name)  # another thread may have taken the name meanwhile
            self._note(packed)
            key = name
            while key in self._store:  # what it was is pinned still
                key = f"{name} ({self._store.registered + 1})"
            self._store.register(key, packed)
            self._loaded[name] = Loaded(adapter, info, key, approximate, dense, sources, group)
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
            self.check_settled([self[name].key for name in how.adapters], "a merge of it that is kept")
        with self.together(f"merge {how.label}"):  # what follows may take all processes
            sources = [self[source] for source in how.adapters]
        with self.together(f"add {how.label}"):
            lowered = [self.lower(loaded) for loaded in sources]
            deltas = kept(dict(merge_adapters(lowered, how, self.bases)), self.bases)
            adapter = to_adapter(deltas, how.label, self.bases)
            own = Lowered(own_parts(deltas, self.bases))
        return self.add(name, adapter, own, sources=() if group is None else how.adapters, group=group)

    def remove(self, name: str, *, when_unused: bool = False) -> None:
        """Forget an adapter, and those that were made of it: with `when_unused` the name of one that calls or pins use,
        and the rest with the last of them.

        Raises:
            UnknownAdapterError: there is none of that name. AdapterInUseError: it is used, or is the default.
        """
        with self._lock:
            going = [name, *self._made_of(name)]
            for one in going:
                self._check_unused(one, name, when_unused)
            for one in going:
                loaded = self._loaded.pop(one)
                self._store.unregister(loaded.key)
                if loaded.group is not None:
                    del loaded.group[one]

    def _made_of(self, name: str) -> list[str]:
        """The names of what was made of it."""
        self[name]
        made = [label for label, other in self._loaded.items() if name in other.sources]
        return list(dict.fromkeys(label for one in made for label in (one, *self._made_of(one))))

    def _check_unused(self, one: str, name: str, when_unused: bool) -> None:
        """Raise `AdapterInUseError` where `one`, which goes with `name`, has to stay."""
        key, what = self._loaded[one].key, "" if one == name else f", of which {one!r} was made"
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
        self._loaded[name] = replace(self._loaded[name], adapter=adapter)

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
            if self[name].key in dict(self._folded.recipe):
                raise errors.AdapterInUseError(
                    f"adapter {name!r} cannot be trained: it is folded into the weights; unmerge_adapter first"
                )
            for made in self._made_of(name):
                if made in self._loaded:  # not gone already, with another of them
                    self.remove(made)

    def _pack(
        self, name: str, deltas: Mapping[str, Delta], adapter: Adapter, trainable: bool
    ) -> tuple[Packed, Adapter]:
        """The blob, and the adapter in memory that it shares with it where it can."""
        by_index: dict[int, Delta] = {}
        for path, delta in deltas.items():
            turned = kernel_major(delta, self.bases[path])
            other = by_index.setdefault(self._indices[path], turned)
            if other is not turned and not other.equals(turned):
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
        if isinstance(adapter.tensors, OnDisk):
            return packed, adapter
        return packed, adapter.holding(tensors_in(packed, by_index, adapter.tensors))

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
