"""`Runtime`: the adapters of one patched model, and which rows use them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from . import errors, routing
from .activation import activation_of, prompt_of
from .adapter import Adapter
from .call import Call
from .fold import Folded
from .layers import Head, Shared, Stack, base_linears, group_heads, group_routes
from .lowering import BaseLinear, Delta, lower, to_adapter
from .lowering.delta import kernel_major
from .merge import Merge, as_merge, merge_adapters, relative
from .ops import layout
from .originals import KEEPS
from .routing import Entries, Entry, Plan, Recipe
from .store import BOTH, GAIN, INPUT, TAIL, TURN, Packed, Store


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

    @property
    def error(self) -> float:
        """The largest of `errors`; 0 where all is exact."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class _Loaded:
    adapter: Adapter
    info: AdapterInfo
    approximate: int | None = None
    merge: Merge | None = None  # of an adapter that an entry asked for


class Runtime:
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
    ) -> None:
        self._model = model
        self._store = store
        self._shared = shared
        self._indices = indices
        self._modules = {indices[name]: (name, module) for name, module in paths.items()}
        self._modules.update({indices[name]: (name, stack.module) for name, stack in stacks.items()})
        self._stacks = [indices[name] for name in stacks]
        self._folded = Folded(model, store, self._modules)
        bases = {
            **base_linears(model, paths, lambda name: self._folded.originals(indices[name])),
            **{name: stack.base(name) for name, stack in stacks.items()},
        }
        self.bases: Mapping[str, BaseLinear] = {
            name: replace(base, weight=partial(self._settled, base.weight), bias=partial(self._settled, base.bias))
            for name, base in bases.items()
        }
        self._default_entry: Entry = None
        self._loaded: dict[str, _Loaded] = {}
        self._merges: OrderedDict[str, None] = OrderedDict()  # results for entries, least recently used first
        self._max_merges = max_merges
        self._bridges: set[str] = set()  # adapters made to undo what is folded in, for rows that name others
        self._active = 0  # calls and `use_adapters` that read the weights
        self._lock = threading.RLock()  # guards the adapters' registry, the count above, and the weights as they change
        self._merging = threading.Lock()  # never taken under the lock above

    def _settled(self, read: Callable[[], Any]) -> Any:
        """read() of a weight of the base, not while another thread is folding something in: lowerings run without the
        lock, and read the base through this."""
        with self._lock:
            return read()

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._model

    # Adapters

    def load_adapter(
        self,
        path_or_id: str | Path,
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        allow_pickle: bool = False,
        approximate: int | None = None,
    ) -> AdapterInfo:
        """Load a PEFT folder or a hub id, under `adapter_name` (default: the last part of its path).

        Args:
            approximate: serve a delta of full rank, which is refused otherwise, as the nearest one of this
                rank; the info's `errors` tell how near. What has an exact form stays exact.

        Raises:
            DuplicateAdapterError: the name is taken.
            AdapterError, UnsupportedAdapterError: it is damaged, does not fit, or cannot be served exactly.
            CapacityError: it is larger than the whole arena.
        """
        name = adapter_name if adapter_name is not None else Path(path_or_id).name
        self._check_new(name)
        adapter = Adapter.from_pretrained(path_or_id, revision=revision, token=token, allow_pickle=allow_pickle)
        return self.add_adapter(name, adapter, approximate=approximate)

    def add_adapter(self, adapter_name: str, adapter: Adapter, *, approximate: int | None = None) -> AdapterInfo:
        """Add an adapter that is in memory. Takes `approximate` and raises as `load_adapter` does."""
        self._check_new(adapter_name)
        return self._register(adapter_name, adapter, lower(adapter, self.bases, approximate), approximate)

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
        how = Merge.from_dict({"adapters": adapters, "weights": given, "combination_type": combination_type, **options})
        return self.add_merge(adapter_name, how)

    def add_merge(self, adapter_name: str, how: Merge) -> AdapterInfo:
        """`add_weighted_adapter` of a `Merge`."""
        self._check_new(adapter_name)
        return self._merge(adapter_name, how, None)

    def _merge(self, adapter_name: str, how: Merge, kept_for: Merge | None) -> AdapterInfo:
        how = how.canonical()
        for name in how.adapters:
            self._check_known(name)
        sources = [self._loaded[name] for name in how.adapters]
        lowered = [lower(loaded.adapter, self.bases, loaded.approximate) for loaded in sources]
        deltas = dict(merge_adapters(lowered, how, self.bases))
        return self._register(adapter_name, to_adapter(deltas, how.label, self.bases), deltas, None, kept_for)

    def _register(
        self,
        adapter_name: str,
        adapter: Adapter,
        deltas: Mapping[str, Delta],
        approximate: int | None = None,
        merge: Merge | None = None,
    ) -> AdapterInfo:
        by_index: dict[int, Delta] = {}
        for name, delta in deltas.items():
            turned = kernel_major(delta, self.bases[name])
            other = by_index.setdefault(self._indices[name], turned)
            if other is not turned and not other.equals(turned):
                raise errors.AdapterError(
                    f"adapter {adapter_name!r}: it has different weights for one shared module under several of its "
                    f"names: {', '.join(sorted({name, *self.bases[name].aliases} & deltas.keys()))}"
                )
        packed = self._store.pack(by_index, f"adapter {adapter_name!r}")
        if packed.invocation and getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            raise errors.UnsupportedAdapterError(
                f"adapter {adapter_name!r}: option alora_invocation_tokens is not served on a model with an encoder, "
                f"whose decoder reads other tokens than input_ids"
            )
        ranks = tuple(sorted({delta.rank // (self.bases[name].experts or 1) for name, delta in deltas.items()}))
        info = AdapterInfo(
            adapter_name, adapter.source, adapter.peft_type, _variant(adapter), ranks[-1], ranks, tuple(deltas),
            packed.nbytes, "host", {name: delta.error for name, delta in deltas.items() if delta.error},
        )  # fmt: skip
        with self._lock:
            self._check_new(adapter_name)  # another thread may have taken the name meanwhile
            self._note(packed)
            self._store.register(adapter_name, packed)
            self._loaded[adapter_name] = _Loaded(adapter, info, approximate, merge)
            return self._info(adapter_name)

    def _note(self, packed: Packed) -> None:
        """Tell compiled code which ops it needs from now on; each is one compilation more, once."""
        shared, touched = self._shared, [self._modules[index][0] for index in np.flatnonzero(packed.touches).tolist()]
        shared.inputs |= bool((packed.touches & INPUT).any())
        shared.turns |= bool((packed.touches & TURN).any())
        shared.norms |= any(self.bases[name].offset is not None for name in touched)
        shared.embeddings |= any(self.bases[name].embed_scale is not None for name in touched)
        shared.experts |= any(self.bases[name].experts for name in touched)
        shared.heads = shared.heads.union(packed.heads)
        shared.tails = shared.tails.union(np.flatnonzero(packed.touches & TAIL).tolist())

    @contextmanager
    def _resolved(self, entries: Any) -> Iterator[Any]:
        """`entries` with every merge replaced by the name of its result, or by weights where it is a plain sum; under
        the lock, so that no result is forgotten before it is pinned."""
        many = isinstance(entries, Sequence) and not isinstance(entries, str)
        while True:
            labels: set[str] = set()
            resolved = [self._without_merge(entry, labels) for entry in (entries if many else [entries])]
            with self._lock:
                if labels <= self._merges.keys():
                    for label in labels:
                        self._merges.move_to_end(label)
                    yield resolved if many else resolved[0]
                    return

    def _without_merge(self, entry: Any, labels: set[str]) -> Any:
        """One entry of `_resolved`; adds the name of a merge's result to `labels`."""
        how = as_merge(entry)
        if how is None:
            return entry
        how = how.canonical()
        if how.is_sum:
            weights: dict[str, float] = {}
            for name, weight in zip(how.adapters, how.weights, strict=True):
                weights[name] = weights.get(name, 0.0) + weight
            return weights
        with self._merging:  # computed once, also when several threads ask for it
            if how.label not in self._merges:
                self._merge(how.label, how, how)
                with self._lock:
                    if how.label in self._loaded:
                        self._merges[how.label] = None
        labels.add(how.label)
        return how.label

    def _forget_merges(self) -> None:
        """Down to `max_merges` results, those that are in use aside."""
        for label in list(self._merges)[: max(0, len(self._merges) - self._max_merges)]:
            with suppress(errors.AdapterInUseError, errors.UnknownAdapterError):
                self.delete_adapter(label)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
            AdapterInUseError: a running call, `use_adapters` or `set_adapter` uses it.
        """
        with self._lock:
            self._check_known(adapter_name)
            if adapter_name in self.merged:
                raise errors.AdapterInUseError(
                    f"adapter {adapter_name!r} cannot be deleted: it is folded into the weights; unmerge_adapter first"
                )
            if self._store[adapter_name].pins:
                default = self._shared.default
                if default is not None and adapter_name in default.names:
                    how = "set_adapter chose it; call set_adapter(None) first"
                else:
                    how = "a running call or an open use_adapters uses it"
                raise errors.AdapterInUseError(f"adapter {adapter_name!r} cannot be deleted: {how}")
            made_of_it = [
                label
                for label, loaded in self._loaded.items()
                if loaded.merge and adapter_name in loaded.merge.adapters
            ]
            for label in made_of_it:
                if label in self._loaded:  # not gone already, with another of them
                    self.delete_adapter(label)
            self._store.unregister(adapter_name)
            self._bridges.discard(adapter_name)
            self._merges.pop(adapter_name, None)
            del self._loaded[adapter_name]

    def save_adapter(self, adapter_name: str, folder: str | Path) -> None:
        """Write an adapter as a PEFT folder, with the very tensors that were loaded."""
        self._check_known(adapter_name)
        self._loaded[adapter_name].adapter.save_pretrained(folder)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """Name -> what is known of it, in the order of loading."""
        return {name: self._info(name) for name in list(self._loaded)}

    def _info(self, name: str) -> AdapterInfo:
        return replace(self._loaded[name].info, location="device" if self._store[name].resident else "host")

    def status(self) -> str:
        """A printable table of the adapters and the arena."""
        rows = [("adapter", "type", "rank", "modules", "bytes", "where", "error")]
        for info in self.adapters.values():
            ranks = str(info.rank) if len(info.ranks) == 1 else f"{info.ranks[0]}-{info.ranks[-1]}"
            kind = info.variant or info.peft_type
            rows.append(
                (
                    info.name,
                    kind,
                    ranks,
                    str(len(info.modules)),
                    f"{info.bytes:,}",
                    info.location,
                    f"{info.error:.1e}" if info.errors else "exact",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        store = self._store
        lines.append(f"arena: {store.used:,} of {store.capacity:,} bytes, {store.arena.dtype} on {store.arena.device}")
        return "\n".join(line.rstrip() for line in lines)

    # Folding into the weights

    @property
    def merged(self) -> dict[str, float]:
        """The recipe that is folded into the weights: adapter -> weight; empty if none is."""
        return dict(self._folded.recipe)

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
        if keep not in KEEPS:
            raise errors.MergeError(f"keep is {keep!r}; it must be one of {', '.join(KEEPS)}")
        if not routing.is_single(entry):
            raise errors.EntryError(f"merge_adapter takes one entry for the whole model, not {entry!r}")
        with self._resolved(entry) as entry:
            self._check_idle("merge_adapter")
            self._folded.replace(self._recipes(entry)[0], keep, checkpoint, safe)
            self._refresh_default()

    def unmerge_adapter(self) -> None:
        """Restore every byte of the weights; nothing happens if nothing is folded in.

        Raises:
            AdapterInUseError: a call is running. MergeError: the checkpoint's files have changed.
        """
        with self._lock:
            self._check_idle("unmerge_adapter")
            self._folded.take_out()
            self._refresh_default()

    def merge_and_unload(self, entry: Entry = None, *, safe: bool = True) -> nn.Module:
        """Fold `entry` (default: what is folded in or set already) into the weights and unpatch: a plain model, which
        `save_pretrained` writes. Raises as `merge_adapter` does."""
        from .patch import unpatch

        with self._resolved(entry) as entry:
            self._check_idle("merge_and_unload")  # or the originals would be forgotten and the model stay patched
            if entry is None and not self._folded.recipe:
                entry = self._default_entry
            if entry is not None:
                self.merge_adapter(entry, safe=safe)
            self.set_adapter(None)
            self._folded.forget()
            return unpatch(self._model)

    def _check_idle(self, what: str) -> None:
        if self._active:
            raise errors.AdapterInUseError(f"{what} changes the weights, while a call or use_adapters is using them")

    def _refresh_default(self) -> None:
        if self._default_entry is not None:
            self.set_adapter(self._default_entry)
        for label in [label for label in self._bridges if not self._store[label].pins]:
            self.delete_adapter(label)

    def _relative(self, recipe: Recipe) -> Recipe:
        """The recipe that does on the folded weights what `recipe` does on the base's. It may name an adapter that
        `_bridge` has yet to make."""
        folded = self._folded.recipe
        if not folded:
            return recipe
        if not any((self._store[name].touches & (GAIN | TURN | INPUT)).any() for name, _ in (*recipe, *folded)):
            difference = dict(recipe)
            for name, weight in folded:
                difference[name] = difference.get(name, 0.0) - weight
            return tuple(sorted((name, weight) for name, weight in difference.items() if weight))
        return () if recipe == folded else ((f"{dict(recipe)} on {dict(folded)}", 1.0),)

    def _bridge(self, recipe: Recipe) -> None:
        """Make the adapter that `_relative` names: lowered without the lock, and dropped where things have changed
        meanwhile."""
        with self._lock:
            folded, version = self._folded.recipe, self._folded.version
            ((label, _),) = self._relative(recipe)
            sources = {name: self._loaded[name] for name, _ in (*recipe, *folded)}
        deltas = {name: lower(one.adapter, self.bases, one.approximate) for name, one in sources.items()}
        for path in {path for d in deltas.values() for path in d if self.bases[path].experts}:
            raise errors.MergeError(
                f"parameter {path}: rows with target_parameters are served beside something folded in only where none "
                f"of the adapters has gains or turns, as DoRA, IA3 and OFT do; unmerge_adapter first"
            )
        made = {
            path: relative(
                [(deltas[name][path], w) for name, w in recipe if path in deltas[name]],
                [(deltas[name][path], w) for name, w in folded if path in deltas[name]],
                path,
            )
            for path in dict.fromkeys(path for d in deltas.values() for path in d)
        }
        with self._lock:
            same = all(self._loaded.get(name) is one for name, one in sources.items())
            if same and self._folded.version == version and label not in self._loaded:
                source = Merge(tuple(sources), (1.0,) * len(sources))
                self._register(label, to_adapter(made, label, self.bases), made, None, source)
                self._bridges.add(label)

    # Routing

    def set_adapter(self, entry: Entry) -> None:
        """Route every row of every later call that names no adapters of its own.

        Raises:
            EntryError, UnknownAdapterError: `entry` is not an entry.
            CapacityError: its adapters do not fit.
        """
        if not routing.is_single(entry):
            raise errors.EntryError(f"set_adapter takes one entry for all rows, not {entry!r}")
        while True:
            with self._lock:
                version = self._folded.version
            plan = self._acquire(entry, 1, 1)
            self._arrive()
            with self._resolved(entry) as resolved:
                if version == self._folded.version:  # or the plan is for weights that another thread has changed
                    previous, self._shared.default = self._shared.default, None if resolved is None else plan
                    self._default_entry = resolved
                    self._release(previous)
                    break
            self._release(plan)
        self._publish()

    @contextmanager
    def use_adapters(self, entries: Entries) -> Iterator[None]:
        """Route everything that this thread runs inside the `with`: one entry a row, or one for all."""
        rows = len(entries) if isinstance(entries, Sequence) else 1
        with self._route(entries, rows, 1):
            self._arrive()
            yield

    def _arrive(self) -> None:
        """Wait until plans are on the device: what they route may run on other streams than this one."""
        device = self._store.arena.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    @contextmanager
    def _route(self, entries: Any, rows: int, expansion: int) -> Iterator[None]:
        local = self._shared.local
        with self._reading_weights():
            plan = self._acquire(entries, rows, expansion)
            previous = local.plan, local.entries
            local.plan, local.entries = plan, entries
            self._publish()
            try:
                yield
            finally:
                local.plan, local.entries = previous
                self._publish()
                self._release(plan)

    @contextmanager
    def _reading_weights(self) -> Iterator[None]:
        """Nothing is folded in or out inside: begins when another thread's folding has ended. A plan holds for the
        weights as they are, so it is made inside."""
        with self._lock:
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1

    @contextmanager
    def _forward(self, entries: Any, call: Call) -> Iterator[None]:
        """A call of the model."""
        local, shape = self._shared.local, call.shape
        previous = local.length, local.activation, local.late
        local.length, local.activation, local.late = shape[1] if len(shape) > 1 else 0, None, []
        try:
            if entries is not None:
                with self._route(entries, shape[0] if shape else 1, 1):
                    self._activate(call)
                    yield
            else:
                plan = local.plan
                listed = plan is not None and not routing.is_single(local.entries)
                if plan is not None and listed and shape and shape[0] not in plan.row_counts:
                    raise errors.EntryError(
                        f"the active routing has {plan.rows} entries; the model was called with {shape[0]} rows"
                    )
                with self._default():
                    self._activate(call)
                    yield
            for late in local.late:
                late.settle()
        finally:
            (local.length, local.activation, local.late), local.siblings = previous, None

    def _activate(self, call: Call) -> None:
        """Find out to which tokens of a forward the aLoRAs of the active plan apply."""
        local = self._shared.local
        plan, prompt = local.plan, local.prompt
        if plan is not None and plan.invocations:
            prompt = prompt if prompt is not None and prompt.plan is plan else None
            local.activation = activation_of(plan, call, prompt, self._store.terms)

    @contextmanager
    def _prompted(self, call: Call) -> Iterator[None]:
        """A `generate` under the active plan."""
        local = self._shared.local
        plan, previous = local.plan, local.prompt
        local.prompt = prompt_of(plan, call) if plan is not None and plan.invocations else None
        try:
            yield
        finally:
            local.prompt = previous

    @contextmanager
    def _default(self) -> Iterator[None]:
        """Keep to the default of now, and keep its adapters, though another thread may set a new one."""
        local = self._shared.local
        with self._reading_weights():
            if local.plan is not None or self._shared.default is None:
                yield
                return
            with self._lock:
                plan = self._shared.default
                if plan is not None:
                    self._store.acquire(plan.names)
            local.plan = plan
            try:
                yield
            finally:
                local.plan = None
                self._release(plan)

    @contextmanager
    def _generation(self, entries: Any, call: Call, expansion: int) -> Iterator[None]:
        """A `generate` that repeats each row `expansion` times."""
        local = self._shared.local
        if entries is None:
            entries = local.entries
        if entries is None:
            with self._default(), self._prompted(call):
                yield
            return
        with self._route(entries, call.shape[0] if call.shape else 1, expansion), self._prompted(call):
            yield

    def _acquire(self, entries: Any, rows: int, expansion: int) -> Plan:
        """Resolve, bring to the device and pin: a plan, to be given back with `_release`."""
        while True:
            with self._resolved(entries) as resolved:  # nothing that is named may be deleted before it is pinned
                recipes = self._recipes(resolved)
                relatives = [self._relative(recipe) for recipe in recipes]
                unmade = [
                    recipe
                    for recipe, relative in zip(recipes, relatives, strict=True)
                    if any(name not in self._loaded for name, _ in relative)
                ]
                if not unmade:
                    plan = self._plan(relatives, None if routing.is_single(resolved) else rows, expansion)
                    self._forget_merges()
                    return plan
            self._bridge(unmade[0])

    def _recipes(self, entries: Any) -> list[Recipe]:
        try:
            return routing.resolve(entries, self._loaded.__contains__)
        except errors.UnknownAdapterError as error:
            self._unknown(error.args[0])

    def _plan(self, recipes: Sequence[Recipe], rows: int | None, expansion: int) -> Plan:
        """Of one recipe a row; `rows` is None where one serves them all."""
        if rows is not None and len(recipes) != rows:
            raise errors.EntryError(f"adapter_names has {len(recipes)} entries for a batch of {rows} rows")
        rows = 1 if rows is None else rows
        names = tuple(sorted({name for recipe in recipes for name, _ in recipe}))
        headed = [self._headed(recipe) for recipe in recipes]
        self._store.acquire(names)
        heads: dict[int, list[Head | None]] = {}
        for row, owners in enumerate(headed):
            for index, name in owners.items():
                packed = self._store[name]  # which is pinned, so that it does not move
                weight, bias, width = packed.heads[index]
                head = Head(packed.offset + weight, bias if bias < 0 else packed.offset + bias, width)
                heads.setdefault(index, [None] * len(recipes))[row] = head
        touches = np.zeros(self._store.tables.shape[0], dtype=np.uint8)
        for name in names:
            touches |= self._store[name].touches
        if (touches & INPUT).any():  # few plans have any, and each one is made within a forward
            for recipe in {recipe for recipe in recipes if recipe}:
                of_row = np.bitwise_or.reduce([self._store[name].touches for name, _ in recipe])
                touches[((of_row & INPUT) > 0) & ((of_row & (GAIN | TURN)) > 0)] |= BOTH
        terms = [self._store.terms(recipe) for recipe in recipes]
        invocations = {name: found for name in names if (found := self._store[name].invocation)}
        experts = bool(touches[self._stacks].any())
        words = routing.plan_words(terms, expansion, bool(heads), experts, bool(invocations))
        device, most = self._store.arena.device, self._shared.plan.numel()
        if len(words) > most and device.type != "cpu":
            self._store.release(names)
            raise errors.CapacityError(
                f"the routing of {rows} rows takes {len(words)} words; the buffer that compiled code and captured "
                f"graphs read has {most}"
            )
        tensor = routing.to_device(words, device)
        grouped = {index: group_heads(found, self._width(index), device) for index, found in heads.items()}
        routes = group_routes(recipes, self._store.__getitem__, self._stacks, device) if experts else ()
        counts = (rows, rows * expansion)
        header = torch.from_numpy(words[: layout.PLAN_HEADER])
        return Plan(
            tensor, header, touches.tobytes(), names, rows, counts, grouped, routes, tuple(recipes), invocations
        )

    def _width(self, index: int) -> int:
        """How many outputs the model's own head has, or tokens its embedding."""
        base = self.bases[self._modules[index][0]]
        return base.out_features if base.embed_scale is None else base.in_features

    def _headed(self, recipe: Recipe) -> dict[int, str]:
        """Module number -> the adapter of `recipe` whose head or embedding of another size serves there."""
        found: dict[int, str] = {}
        for name, weight in recipe:
            for index in self._store[name].heads:
                beside = [other for other, _ in recipe if other != name and self._store[other].touches[index]]
                if weight != 1 or beside:
                    with_what = f"with {', '.join(map(repr, beside))}" if beside else f"at a weight of {weight}"
                    raise errors.EntryError(
                        f"adapter {name!r} has weights of another size at {self._modules[index][0]}, which take the "
                        f"place of the model's: there is no sum {with_what}"
                    )
                found[index] = name
        return found

    def _release(self, plan: Plan | None) -> None:
        if plan is not None:
            self._store.release(plan.names)

    def _publish(self) -> None:
        """Copy the current plan into the buffer that compiled code reads. Of one that is too large only the header:
        kernels on the host refuse a plan that is shorter than its header says, and on other devices `_plan` did."""
        plan = self._shared.local.plan or self._shared.default
        words = self._shared.blank if plan is None else plan.tensor
        if words.numel() > self._shared.plan.numel():
            words = words[: layout.PLAN_HEADER]
        self._shared.plan[: words.numel()].copy_(words)
        if plan is None:
            self._shared.header.zero_()
        else:
            self._shared.header.copy_(plan.header)

    # Checks

    def _check_new(self, name: Any) -> None:
        if not isinstance(name, str) or not name or name == routing.BASE:
            raise errors.EntryError(
                f"{name!r} cannot name an adapter: it must be a string other than '' and '__base__'"
            )
        if name in self._loaded:
            raise errors.DuplicateAdapterError(
                f"an adapter {name!r} is loaded already, from {self._loaded[name].info.source}; delete it first"
            )

    def _check_known(self, name: str) -> None:
        if name not in self._loaded:
            self._unknown(name)

    def _unknown(self, name: Any) -> NoReturn:
        known = ", ".join(map(repr, self._loaded)) or "none"
        raise errors.UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {known}") from None

    def _close(self) -> None:
        if self._active:
            raise errors.PatchError("the model cannot be unpatched while a call or use_adapters is routing it")
        if self._folded.recipe:
            raise errors.PatchError("an adapter is folded into the weights: unmerge_adapter first, or merge_and_unload")
        if self._shared.default is not None:
            self.set_adapter(None)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise errors.PatchError("a patched model cannot be copied; unpatch it, copy it, patch both")

    def __reduce__(self) -> NoReturn:
        raise errors.PatchError("a patched model cannot be pickled; use save_pretrained or its state_dict")


def _variant(adapter: Adapter) -> str:
    config = adapter.config
    if config.get("use_dora"):
        return "DoRA"
    if config.get("alora_invocation_tokens"):
        return "aLoRA"
    return "rsLoRA" if config.get("use_rslora") else ""
