"""`Runtime`: what users hold; the adapters of one patched model, what is folded into it, and which rows use them."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from . import errors
from .adapters.adapter import Adapter
from .adapters.keys import check_ignore
from .adapters.on_disk import OnDisk
from .arena.cache import Cache
from .arena.store import Store
from .folding.fold import Folded
from .folding.originals import KEEPS
from .layers import Shard, Stack, base_linears
from .lowering import BaseLinear, Names, check_full_rank
from .lowering.reads import note
from .merge import Merge
from .patched import unpatch
from .plan.shared import Shared
from .routing.axes import learn_axes
from .routing.bridges import Bridges
from .routing.entries import Entries, Entry, check_lengths, is_single
from .routing.files import Files, default_name, files_of, in_folder
from .routing.info import AdapterInfo, HostUse
from .routing.kept import Kept
from .routing.merge_cache import MergeCache
from .routing.pin import Pin, Pinned
from .routing.planner import Planner
from .routing.prefetch import Prefetcher
from .routing.ranks import Ranks
from .routing.readers import Readers
from .routing.registry import Registry
from .routing.router import Router
from .routing.status import status
from .routing.tiers import Tiers
from .training.fresh import fresh
from .training.parameters import Trains
from .training.trainable import check_config, keys_of


class Runtime(Trains):
    """Made by `mlora.patch`, also reachable as `model.mlora`. `bases`: dotted path -> linear, norm, token embedding or
    parameter of fused experts that adapters can change.

    Wherever entries are taken, one is an adapter's name, `None` or `"__base__"` for the bare model, a mapping
    name -> weight for a weighted sum of deltas, or a `Merge` (also as a mapping with its fields), which is computed
    once and kept under its label, until `max_merges` others have been used since.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        shared: Shared,
        indices: Mapping[str, int],
        paths: Mapping[str, nn.Module],
        stacks: Mapping[str, Stack],
        max_merges: int,
        packed_cache: str | Path | None,
        shards: Mapping[str, Shard],
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._model = model
        self._store = store
        self._shared = shared
        self._indices = indices
        # Guards the registry with the names that the merge cache and the bridges keep of theirs, the number of readers,
        # the default, which scopes are open, and the weights as they change. The store's own lock may be taken under
        # it, the cache's never.
        lock = self._lock = shared.scopes.lock
        modules = {indices[name]: (name, module) for name, module in paths.items()}
        modules.update({indices[name]: (name, stack.module) for name, stack in stacks.items()})
        folded = self._folded = Folded(model, store, modules)
        bases = {
            **base_linears(model, paths, lambda name: folded.originals(indices[name])),
            **{name: stack.base(name) for name, stack in stacks.items()},
        }
        self.bases: Mapping[str, BaseLinear] = {
            name: replace(
                base,
                weight=partial(_read, base.weight, lock, name, "weight"),
                bias=partial(_read, base.bias, lock, name, "bias"),
                held=partial(_read, base.held, lock, name, "weight"),
                cut=shards[name].cut if name in shards else base.cut,
            )
            for name, base in bases.items()
        }
        encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        numbers = {name: shard.number for name, shard in shards.items()}
        self._registry = Registry(model, store, shared, folded, self.bases, indices, numbers, encoder, lock, ranks)
        kept = None if packed_cache is None else Kept(Cache(packed_cache), store, model, self.bases, indices)
        self._tiers = Tiers(self._registry, store, kept, folded, lock)
        self._merges = MergeCache(self._registry, self._tiers, max_merges, lock)
        self._bridges = Bridges(self._registry, folded, store, lock)
        self._readers = Readers(lock)
        experts = [indices[name] for name in stacks]
        self._planner = Planner(
            self._registry, self._merges, self._bridges, self._tiers, store, shared, experts, lock, ranks
        )
        self._prefetch = Prefetcher(self._planner.bring)
        self._router = Router(self._planner, self._merges, self._readers, store, shared, lock)

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._model

    @property
    def processes(self) -> int:
        """Over how many processes the model is split; 1 where it is not."""
        return 1 if self._ranks is None else self._ranks.world

    @property
    def process(self) -> int:
        """Which of these processes this is, from 0."""
        return 0 if self._ranks is None else self._ranks.rank

    def from_first(self, value: Any) -> Any:
        """What the first of these processes gives, in all of them, which call this together. It is pickled."""
        return value if self._ranks is None else self._ranks.all_of(value)[0]

    # Adapters

    def load_adapter(
        self,
        path_or_id: str | Path,
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        approximate: int | None = None,
        dense: bool = False,
        strict: bool = False,
        ignore: Sequence[str] = (),
        is_trainable: bool = False,
    ) -> AdapterInfo:
        """Load a PEFT folder or a hub id, or the `subfolder` of one, under `adapter_name` (default: the last part of
        its path).

        Args:
            ignore: config fields and tensors that are left out, by name or, of tensors, by pattern (`v_head.*`): for
                what mlora does not know and refuses, and you know to say nothing. The info's `ignored` tells what was.
            approximate: serve a delta of full rank, which is refused otherwise, as the nearest one of this
                rank; the info's `errors` tell how near. What has an exact form stays exact.
            dense: serve such a delta exactly instead, as the matrix that it is: each module takes a copy of its weight
                for this adapter; the info's `dense` tells their bytes. What has a smaller exact form keeps it.
            strict: refuse an adapter whose config targets modules that its files have nothing for, or whose files have
                weights for modules that this model does without. PEFT leaves both alone, and so does mlora otherwise,
                with a warning; the info's `missing` and `unused` tell which.
            is_trainable: give it parameters (`named_parameters`), to train it further.

        Raises:
            DuplicateAdapterError: the name is taken.
            AdapterError, UnsupportedAdapterError: it is damaged, does not fit, or cannot be served or trained exactly.
            CapacityError: it is larger than the whole arena.
        """
        name = adapter_name if adapter_name is not None else default_name(path_or_id, subfolder)
        if is_trainable or self._ranks is not None:
            with self._registry.together(f"load adapter {name!r}"):
                self._registry.check_new(name)
                adapter = Adapter.from_pretrained(
                    path_or_id,
                    revision=revision,
                    token=token,
                    subfolder=subfolder,
                    allow_pickle=allow_pickle,
                    ignore=ignore,
                    in_memory=self._ranks is None,
                )
            return self._add(name, adapter, approximate, dense, strict, is_trainable)
        files = _files(path_or_id, revision, token, subfolder, allow_pickle, approximate, dense, strict, ignore)
        self._registry.check_new(name)
        return self._tiers.load(name, files)

    def register_adapter(
        self,
        path_or_id: str | Path,
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        approximate: int | None = None,
        dense: bool = False,
        strict: bool = False,
        ignore: Sequence[str] = (),
    ) -> None:
        """Make an adapter known by its name, and load it when something needs it. The arguments are those of
        `load_adapter`. What is wrong with its files is an error of the call that needs it first, which names it;
        nothing of that call has run then.

        Raises:
            DuplicateAdapterError: the name is taken. EntryError: it cannot name an adapter.
        """
        self._refuse_split("registers adapters by their files", errors.UnsupportedAdapterError)
        files = _files(path_or_id, revision, token, subfolder, allow_pickle, approximate, dense, strict, ignore)
        name = adapter_name if adapter_name is not None else default_name(path_or_id, subfolder)
        self._registry.register({name: files})

    def register_adapters(
        self,
        folder: str | Path,
        *,
        allow_pickle: bool = False,
        approximate: int | None = None,
        dense: bool = False,
        strict: bool = False,
        ignore: Sequence[str] = (),
    ) -> list[str]:
        """`register_adapter` of everything in a folder, under its name there: folders, `.safetensors` files, whose
        names go without that, and links to either. No file is opened, and a hundred thousand take a second or two.

        Returns:
            The names, sorted.

        Raises:
            AdapterError: there is no such folder. DuplicateAdapterError: a name is taken; nothing is registered then.
        """
        self._refuse_split("registers adapters by their files", errors.UnsupportedAdapterError)
        options = _files(folder, None, None, None, allow_pickle, approximate, dense, strict, ignore).options
        found: dict[str, Files] = {}
        for name, path in sorted(in_folder(folder)):
            if name in found:
                raise errors.DuplicateAdapterError(f"{folder} has {name} twice: {found[name].source} and {path}")
            found[name] = Files(path, options)
        self._registry.register(found)
        return list(found)

    def prefetch(self, entries: Entries) -> Future[None]:
        """Bring what entries need to the device while calls run, on threads of their own: adapters are read and
        lowered, merges computed. A call that comes meanwhile waits for what it needs itself, and for nothing else. What
        was prefetched may be dropped again before a call needs it, where there is room for little.

        Args:
            entries: one, or a list, as `adapter_names` has them.

        Returns:
            When all of it is there. It has the first error, which a call that needs that adapter raises, too.
        """
        self._refuse_split("prefetches", errors.RoutingError)
        listed: Any = [entries] if is_single(entries) else entries
        return self._prefetch(list(listed))

    @property
    def host(self) -> HostUse:
        """What adapters take on the host, and how often they were loaded and dropped."""
        return self._tiers.use

    def add_adapter(
        self,
        adapter_name: str,
        adapter: Any,
        *,
        seed: int | None = None,
        eva_state_dict: Mapping[str, Tensor] | None = None,
        approximate: int | None = None,
        dense: bool = False,
        strict: bool = False,
        ignore: Sequence[str] = (),
        is_trainable: bool = False,
    ) -> AdapterInfo:
        """Add an adapter that is in memory: an `Adapter`, or a new one of a `peft.LoraConfig` (or its fields), which is
        trainable and starts as PEFT's does after `torch.manual_seed(seed)`; one with `init_lora_weights="eva"` from
        `eva_state_dict`, which is what `peft.get_eva_state_dict(model, dataloader, config)` returns. Its dropout has
        that seed too. Takes the other arguments and raises as `load_adapter` does."""
        with self._registry.together(f"add adapter {adapter_name!r}"):
            self._registry.check_new(adapter_name)
        if not isinstance(adapter, Adapter):
            self._refuse_split("trains adapters", errors.UnsupportedAdapterError)
            adapter, is_trainable = fresh(adapter, self._model, self.bases, seed, eva_state_dict), True
        return self._add(adapter_name, adapter.ignoring(ignore), approximate, dense, strict, is_trainable, seed=seed)

    def _add(
        self,
        name: str,
        adapter: Adapter,
        approximate: int | None = None,
        dense: bool = False,
        strict: bool = False,
        is_trainable: bool = False,
        replaces: bool = False,
        seed: int | None = None,
    ) -> AdapterInfo:
        if is_trainable:  # first, or who wants to train it would be told how to serve it
            self._refuse_split("trains adapters", errors.UnsupportedAdapterError)
            check_config(adapter.config, adapter.source)
        if self._ranks is not None:
            self._ranks.agree(f"lower adapter {name!r}, {_told(adapter, approximate, dense)}")
        with self._registry.together(f"have lowered adapter {name!r}"):
            adapter = self._registry.own_part(adapter)
            lowered = self._registry.lowered(adapter, approximate, dense, strict=strict, trainable=is_trainable)
        names = Names(self._model, self.bases)
        keys = keys_of(adapter, lowered.deltas, names, self._indices, self.bases) if is_trainable else None
        trainable = keys is not None
        info = self._registry.add(name, adapter, lowered, approximate, dense, replaces=replaces, trainable=trainable)
        if keys is not None:
            try:
                self._train(name, adapter, keys, seed)
            except BaseException:
                self._registry.remove(name)
                raise
        if lowered.remark:
            warnings.warn(f"adapter {name!r} from {adapter.source}: {lowered.remark}", stacklevel=3)
        return info

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> AdapterInfo:
        """Merge loaded adapters into a new one. `options` are the other fields of `Merge`, which also says what the
        arguments mean; PEFT's names, with PEFT's defects mended: every type of adapter and any ranks take part, each
        with its own scaling, gains and biases.

        The info's `errors` tell how far each module is from what the merge stands for, where it was cut to a rank.

        Raises:
            MergeError: the arguments do not make a merge, or factor space cannot hold these adapters.
            UnknownAdapterError, DuplicateAdapterError: of the names. CapacityError: as `load_adapter`.
        """
        given = () if weights is None else weights  # only a mapping may leave them out
        fields = {"adapters": adapters, "weights": given, "combination_type": combination_type, **options}
        with self._registry.together(f"make the merge {adapter_name!r}"):
            how = Merge.from_dict(fields)
        return self.add_merge(adapter_name, how)

    def add_merge(self, adapter_name: str, how: Merge) -> AdapterInfo:
        """`add_weighted_adapter` of a `Merge`; raises as that does."""
        with self._registry.together(f"add the merge {adapter_name!r}"):
            self._registry.check_new(adapter_name)
        return self._registry.add_merge(adapter_name, how)

    def replace_adapter(self, adapter_name: str, source: str | Path | Adapter, **options: Any) -> AdapterInfo:
        """Give a loaded name another adapter: `source` and `options` are those of `load_adapter`, or of `add_adapter`.
        Entries that name it from then on get the new one; calls that run, open `use_adapters` and pins keep the old,
        which goes with the last of them.

        Raises:
            UnknownAdapterError: there is none of that name. AdapterInUseError: it, or what was made of it, is the
                default or folded into the weights. Others: as `load_adapter`; the name is left as it was then.
        """
        if not isinstance(source, Adapter) and self._ranks is None:
            self._registry[adapter_name]
            return self._tiers.load(adapter_name, _files(source, **options), replaces=True)
        with self._registry.together(f"replace adapter {adapter_name!r}"):
            self._registry[adapter_name]
            lowering = {key: options.pop(key) for key in ("approximate", "dense", "strict") if key in options}
            if isinstance(source, Adapter):
                adapter = source.ignoring(**options) if options else source
            else:
                adapter = Adapter.from_pretrained(source, **options, in_memory=self._ranks is None)
        return self._add(adapter_name, adapter, replaces=True, **lowering)

    def delete_adapter(self, adapter_name: str, *, when_unused: bool = False) -> None:
        """Forget an adapter, and the merges in requests that were made of it. With `when_unused` the name is free at
        once, and the adapter itself goes with the last call, `use_adapters` or pin that uses it.

        Raises:
            UnknownAdapterError: there is none of that name.
            AdapterInUseError: a running call, `use_adapters` or pin uses it and not `when_unused`; or `set_adapter`
                chose it, or it is folded into the weights.
        """
        self._registry.remove(adapter_name, when_unused=when_unused)

    def save_adapter(self, adapter_name: str, folder: str | Path) -> None:
        """Write an adapter as a PEFT folder, with the very tensors that were loaded. A PiSSA or OLoRA whose base PEFT
        would rewrite is written as the LoRA of twice its rank that it is beside the untouched base.

        Raises:
            UnknownAdapterError: there is none of that name. AdapterError: its files are not what they were.
        """
        self._registry.adapter(adapter_name).save_pretrained(folder)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """Name -> what is known of it, in the order of loading."""
        return self._registry.infos()

    @property
    def sources(self) -> dict[str, str]:
        """Name -> where it comes from, of all but what requests' merges made: quicker than `adapters` of very many."""
        return self._registry.sources()

    def adapter(self, adapter_name: str) -> AdapterInfo | None:
        """What is known of one adapter; None where there is none of that name."""
        with self._lock:
            return self._registry.info(adapter_name) if adapter_name in self._registry else None

    @property
    def slots(self) -> int:
        """How many adapters can be on the device at once."""
        return self._store.slots

    def status(self) -> str:
        """A printable table of the adapters and the arena."""
        return status(self.adapters.values(), self._store, self.host)

    # Folding into the weights

    @property
    def merged(self) -> dict[str, float]:
        """The recipe that is folded into the weights: adapter -> weight; empty if none is."""
        named = [(self._registry.by_key(key), weight) for key, weight in self._folded.recipe]
        return {loaded.info.name: weight for loaded, weight in named if loaded is not None}

    def merge_adapter(
        self, entry: Entry, *, keep: str = "copy", checkpoint: str | Path | None = None, safe: bool = True
    ) -> None:
        """Fold `entry` into the base weights, in place: calls that name no adapters get it at the bare model's speed.

        Rows that name adapters get those alone, and base rows the base, up to the rounding of the folded weights.
        What was folded in before is replaced.

        Args:
            keep: what `unmerge_adapter` will restore the bytes from: "copy" (a copy of each weight on the host),
                "checkpoint" (nothing is kept: the files are read again), or "corrections" (a byte a weight, for
                recipes that only add to it).
            checkpoint: the folder of those files; default: where the model says that it came from.
            safe: first make sure that every result is finite, by computing it once more.

        Raises:
            MergeError: a weight is tied, quantized or offloaded, has no bias to add to, would overflow, or cannot be
                restored in the way asked for. Nothing has changed then.
            UnknownAdapterError, EntryError, CapacityError: as `set_adapter`. AdapterInUseError: a call is running.
        """
        self._refuse_split("folds adapters into weights", errors.MergeError)
        if keep not in KEEPS:
            raise errors.MergeError(f"keep is {keep!r}; it must be one of {', '.join(KEEPS)}")
        if not is_single(entry):
            raise errors.EntryError(f"merge_adapter takes one entry for the whole model, not {entry!r}")
        with self._merges.resolved(entry) as entry:
            self._readers.refuse("merge_adapter")
            (recipe,) = self._registry.recipes(entry)
            self._registry.check_settled([name for name, _ in recipe], "what is folded in of it")
            self._folded.replace(recipe, keep, checkpoint, safe)
            self._refresh_default()

    def unmerge_adapter(self) -> None:
        """Restore every byte of the weights; nothing happens if nothing is folded in.

        Raises:
            AdapterInUseError: a call is running. MergeError: the checkpoint's files have changed.
        """
        with self._lock:
            self._readers.refuse("unmerge_adapter")
            self._folded.take_out()
            self._refresh_default()

    def merge_and_unload(self, entry: Entry = None, *, safe: bool = True) -> nn.Module:
        """Fold `entry` (default: what is folded in or set already) into the weights and unpatch: a plain model, which
        `save_pretrained` writes. Raises as `merge_adapter` does."""
        with self._merges.resolved(entry) as entry:
            self._readers.refuse("merge_and_unload")  # or the originals would be forgotten and the model stay patched
            if entry is None and not self._folded.recipe:
                entry = self._router.default_entry
            if entry is not None:
                self.merge_adapter(entry, safe=safe)
            self.set_adapter(None)
            self._folded.forget()
            return unpatch(self._model)

    def _refresh_default(self) -> None:
        """Make its plan anew, for the weights as they are now."""
        if self._router.default_entry is not None:
            self._router.set_default(self._router.default_entry)
        self._bridges.drop()

    # Routing

    def set_adapter(self, entry: Entry) -> None:
        """Route every row of every later call that names no adapters of its own.

        Raises:
            EntryError, UnknownAdapterError: `entry` is not an entry.
            CapacityError: its adapters do not fit.
        """
        if not is_single(entry) or isinstance(entry, Pinned):
            raise errors.EntryError(f"set_adapter takes one entry for all rows, not {entry!r}")
        self._router.set_default(entry)

    @contextmanager
    def use_adapters(
        self,
        entries: Entries,
        *,
        lengths: Sequence[int] | None = None,
        starts: Sequence[Mapping[str, int | None]] | None = None,
    ) -> Iterator[None]:
        """Route everything that runs inside the `with`, and in tasks started there: one entry a row, or one for all.

        With `lengths` the batch is packed: sequences of these many tokens lie one behind another in one row of
        T = sum(lengths), as attention by `cu_seq_lens` or `position_ids` has them, and `entries` has one a sequence.
        Calls inside have inputs of (1, T), (T,), (1, T, hidden) or (T, hidden), and may pick tokens for the head
        (`logits_to_keep`). Padding is one more sequence, with the entry None. That the sequences do not see each other
        is up to the model's attention. Compiled code does not serve it.

        Args:
            lengths: tokens of each sequence, each at least 1.
            starts: of each sequence, aLoRA -> the index in it of the first token that the aLoRA applies to, 0 or less
                where that is all of them, None where it is none: for calls that go on behind tokens in a cache.
                Without it the invocation is looked for in the call's own input_ids.

        Raises:
            EntryError, UnknownAdapterError, MergeError: an entry is none, or `lengths` and `starts` do not fit.
            AttributionError: packed sequences differ in a module that gets their tokens in no order that can be told.
            CapacityError: its adapters do not fit on the device together.
        """
        rows = len(entries) if isinstance(entries, Sequence) and not isinstance(entries, str) else 1
        if lengths is not None:
            check_lengths(lengths, starts)
            rows = len(lengths)
        elif starts is not None:
            raise errors.EntryError("starts= is of packed sequences; give their lengths= too")
        with self._router.use(entries, rows, lengths or (), starts or ()):
            self._router.arrive()
            yield

    def pin(self, entry: Entry) -> Pin:
        """Bring what `entry` needs to the device, and keep it there as it is until the pin is released: for code that
        routes it call after call, while adapters are loaded, replaced and deleted beside. Merges are computed first.

            with runtime.pin("sql") as pin, runtime.use_adapters([pin.entry, None]):
                ...

        Raises:
            EntryError, UnknownAdapterError, MergeError: `entry` is no entry.
            CapacityError: its adapters do not fit on the device beside what is pinned already.
        """
        if not is_single(entry):
            raise errors.EntryError(f"pin takes one entry, not {entry!r}")
        return self._router.pin(entry)

    def check_packed(self, entry: Entry) -> None:
        """Raise `AttributionError` where packed sequences of this entry and others (`use_adapters` with `lengths`)
        would be refused; nothing is brought to the device. Where the model normalizes heads and `entry` changes that,
        it may be called once, to see in which order they come."""
        if not is_single(entry):
            raise errors.EntryError(f"check_packed takes one entry, not {entry!r}")
        paths = self._planner.check_packed(entry)
        learn_axes(self._model, self._shared, paths)

    def _close(self) -> None:
        if self._readers.count:
            raise errors.PatchError("the model cannot be unpatched while a call or use_adapters is routing it")
        if self._folded.recipe:
            raise errors.PatchError("an adapter is folded into the weights: unmerge_adapter first, or merge_and_unload")
        if self._shared.default is not None:
            self.set_adapter(None)
        self._prefetch.close()
        self._thaw()
        if self._ranks is not None:
            self._ranks.close()

    def _refuse_split(self, what: str, kind: type[errors.MloraError]) -> None:
        """Raise where the model is split over processes, on which nothing `what`."""
        if self._ranks is not None:
            raise kind(
                f"this model is split over {self._ranks.world} processes, on which mlora neither trains adapters nor "
                f"folds, drops or prefetches them; it {what} on a model in one process"
            )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise errors.PatchError("a patched model cannot be copied; unpatch it, copy it, patch both")

    def __reduce__(self) -> NoReturn:
        raise errors.PatchError("a patched model cannot be pickled; use save_pretrained or its state_dict")


def _told(adapter: Adapter, approximate: int | None, dense: bool) -> str:
    """What tells an adapter and how it is lowered from others, short of its numbers."""
    tensors = adapter.tensors
    if isinstance(tensors, OnDisk):
        header: Any = tensors.header()
    else:
        header = [(key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()]
    config = sorted((key, str(value)) for key, value in adapter.config.items() if not isinstance(value, set))
    digest = hashlib.sha256(repr((config, sorted(header), approximate, dense)).encode()).hexdigest()
    return f"whose {len(header)} tensors, config and options have the digest {digest[:12]}"


def _files(
    path_or_id: str | Path,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    approximate: int | None = None,
    dense: bool = False,
    strict: bool = False,
    ignore: Sequence[str] = (),
) -> Files:
    """Raises `AdapterError` where they are none, or an option is wrong."""
    check_ignore(ignore)
    check_full_rank(approximate, dense)
    given = {
        "revision": revision, "token": token, "subfolder": subfolder, "allow_pickle": allow_pickle,
        "approximate": approximate, "dense": dense, "strict": strict, "ignore": ignore,
    }  # fmt: skip
    return files_of(path_or_id, {option: value for option, value in given.items() if value})


def _read(read: Callable[[], Any], lock: threading.RLock, path: str, what: str) -> Any:
    """read() of a weight of the base, not while another thread is folding something in: lowerings run without the lock,
    and read the base through this."""
    note(path, what)
    with lock:
        return read()
