"""What layers ask, when autograd records them, of a plan with adapters that are being trained."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arena.bits import DROP
from ..arena.store import Store
from ..ops import reference
from ..plan.plan import Plan, to_device
from .dropout import Drops
from .parts import GAIN, IN_GAIN, Found, Part
from .trained import Trained

# Of each recipe of a plan, the tokens that take it, int64, and the (slot, weight) of its terms.
Routes = list[tuple[Tensor, list[tuple[int, float]]]]


class Site:
    """One module under one plan.

    Args:
        words: the plan's. `table`, `exchanged`: the module's, and that with A and B, gains and input gains exchanged.
        ranks, rows: a call of T tokens keeps T / rows * ranks numbers for the backward pass (v).
        alone: the slots of those whose rows have no other adapter, and the weight 1.
        trained: those that train here, by slot. `routes`: of the plan, by tokens and device; filled as they
            are asked for.

    `outputs` and `inputs`: their parts here, by slot, as functions of what the module gives and of what its base reads
    have them; `parameters` and `read_parameters` are those of these, in the order in which gradients are returned.
    `reads`: the bits of what the first are made of. The gradients of rank rows lie in one buffer of `size` numbers, at
    `a` and `b` of each slot, where kernels read that.
    """

    def __init__(
        self,
        training: Training,
        plan: Plan,
        index: int,
        ranks: int,
        rows: int,
        trained: dict[int, Trained],
        routes: dict[tuple[int, torch.device], Routes],
        alone: Collection[int],
    ) -> None:
        store = training.store
        home = store.homes[index]
        self.training, self.plan, self.index, self.ranks, self.rows = training, plan, index, ranks, rows
        self.arena, self.words = store.spaces[home].arena, plan.tensors[home]
        self.table, self.exchanged = store.table(index), store.exchanged(index)
        parts: dict[int, Part] = {slot: one.parts[index] for slot, one in trained.items()}
        self.inputs = {slot: part for slot, part in parts.items() if part.reads & IN_GAIN}
        self.outputs = {slot: part for slot, part in parts.items() if slot not in self.inputs}
        self.parameters = [parameter for part in self.outputs.values() for parameter in part.parameters]
        self.read_parameters = [parameter for part in self.inputs.values() for parameter in part.parameters]
        self.reads = functools.reduce(operator.or_, (part.reads for part in self.outputs.values()), 0)
        self.trained = trained
        self._routes, self._alone = routes, alone
        self.size = 0
        starts = np.full((2, len(self.table)), -1, dtype=np.int64)
        self._views: dict[int, list[tuple[Any, ...] | None]] = {slot: [] for slot in self.outputs}
        for slot, part in self.outputs.items():
            for offsets, shape in zip(starts, (part.shape_a, part.shape_b), strict=True):
                self._views[slot].append(None if shape is None else (shape, (shape[1], 1), self.size))
                if shape is not None:
                    offsets[slot] = self.size
                    self.size += math.prod(shape)
        self.a, self.b = to_device(starts, self.arena.device)
        self._lying: list[tuple[Any, ...]] | None = None  # of all gradients, where they are rank rows and nothing else
        if all(part.as_they_lie for part in self.outputs.values()):
            self._lying = []
            for a, b in self._views.values():
                assert a is not None and b is not None
                (rank, width), _, at = b
                self._lying += [a, ((width, rank), (1, width), at)]

    @property
    def trains(self) -> bool:
        """Whether any adapter has parameters here."""
        return bool(self.outputs or self.inputs)

    @property
    def by_output(self) -> list[int]:
        """The slots whose gains' gradients are made of what the module gives, if it has no bias (`Found.output`)."""
        return [slot for slot, part in self.outputs.items() if part.by_output and slot in self._alone]

    def gained(self, apart: bool) -> list[int]:
        """The slots whose gains' gradients are made of what the base gives; `apart`: those of `by_output` left out."""
        left_out = self.by_output if apart else []
        return [slot for slot, part in self.outputs.items() if part.reads & GAIN and slot not in left_out]

    def kept(self, x: Tensor) -> Tensor:
        """Room for v of a call on x, (..., in)."""
        count = x.numel() // x.shape[-1] // self.rows * self.ranks if self.ranks else 0
        return x.new_empty(count, dtype=torch.promote_types(x.dtype, torch.float32))

    def routes(self, tokens: int) -> Routes:
        """Of a call on so many tokens."""
        key = tokens, self.words.device
        found = self._routes.get(key)
        if found is None:
            read = reference.routes(self.words, self.table, tokens)
            found = [(route.tokens, [(term.slot, term.weight) for term in route.terms]) for route in read]
            self._routes[key] = found
        return found

    def lying(self, flat: Tensor, needed: Sequence[bool]) -> list[Tensor | None] | None:
        """The gradients of all parameters in a buffer of those of rank rows, None of those not `needed`; None where
        they are not these alone."""
        if self._lying is None:
            return None
        return [flat.as_strided(*at) if one else None for at, one in zip(self._lying, needed, strict=True)]

    def rank_rows(self, flat: Tensor, slot: int) -> Found:
        """The gradients of a slot's rank rows in a buffer of them, without a copy: autograd takes them as they are."""
        return Found(*(None if at is None else flat.as_strided(*at) for at in self._views[slot]))


class Training:
    """Of a runtime that has adapters with parameters.

    Args:
        made: what `again` takes, of a plan whose adapters are pinned.
        again: a context of that plan, pinned: of the very same adapters with the same numbers, wherever they lie.
    """

    def __init__(
        self, store: Store, made: Callable[[Plan], Any], again: Callable[[Any], AbstractContextManager[Plan]]
    ) -> None:
        self.store = store
        self.again = again
        self._made = made
        self._kept: _Sites | None = None
        self._dropping: tuple[Plan, list[tuple[Trained, int]], Plan, Mapping[torch.device, Tensor]] | None = None

    def site(self, plan: Plan, index: int) -> Site | None:
        """Of a module under a plan whose adapters are pinned; None where none of them has parameters."""
        sites = self._sites(plan)
        return sites.of(index) if sites.trained else None

    def begin(self, plan: Plan, rows: int) -> Drops | None:
        """Of a call of the model on so many rows that autograd may record: what its layers ask about dropout, and the
        plan that tells them to (`Drops.plan`); None where no adapter of the plan has any."""
        adapters = self._that_drop(plan)
        if not adapters:
            return None
        made_of = [(one, one.dropout.seed) for one in adapters.values()]
        kept = self._dropping
        if kept is None or (plan is not kept[0] and plan is not kept[2]) or kept[1] != made_of:
            odds = np.stack([one.dropout.odds(len(plan.touches)) for one in adapters.values()], 1)
            of_device = {device: to_device(odds, device) for device in self.store.devices}
            kept = self._dropping = plan, made_of, _marked(plan, adapters), of_device
        *_, dropping, of_modules = kept
        return Drops(dropping, rows, {name: one.dropout for name, one in adapters.items()}, of_modules)

    def resume(self, plan: Plan) -> Plan:
        """The plan of a `Drops` again, of the same adapters."""
        return _marked(plan, self._that_drop(plan))

    def _that_drop(self, plan: Plan) -> dict[str, Trained]:
        sources = {name: self.store[name].source for name in plan.names}
        return {name: one for name, one in sources.items() if isinstance(one, Trained) and one.drops}

    def made(self, plan: Plan) -> Any:
        """For `again`, as the numbers are now."""
        sites, changes = self._sites(plan), self.store.changes
        if sites.made is None or sites.made[0] != changes:
            sites.made = changes, self._made(plan)
        return sites.made[1]

    def _sites(self, plan: Plan) -> _Sites:
        kept = self._kept
        if kept is None or kept.plan is not plan:
            kept = self._kept = _Sites(self, plan)
        return kept


class _Sites:
    """Those of one plan, made as they are asked for."""

    def __init__(self, training: Training, plan: Plan) -> None:
        self.plan = plan
        self.made: tuple[int, Any] | None = None
        self._training = training
        self._sites: dict[int, Site] = {}
        self._routes: dict[tuple[int, torch.device], Routes] = {}  # of all of them
        store = training.store
        self.trained: dict[int, Trained] = {}  # by slot
        for name in sorted({name for recipe in plan.recipes for name, _ in recipe}):  # not all are, of picked tokens
            if isinstance(source := store[name].source, Trained):
                self.trained[store[name].slot] = source
        if self.trained:
            self._rows, self._ranks = store.rank_rows(plan.words)
        mixed = {name for recipe in plan.recipes if len(recipe) > 1 for name, _ in recipe}
        mixed |= {name for recipe in plan.recipes for name, weight in recipe if weight != 1}
        self._alone = self.trained.keys() - {store[name].slot for name in mixed}

    def of(self, index: int) -> Site:
        site = self._sites.get(index)
        if site is None:
            trained = {slot: one for slot, one in self.trained.items() if index in one.parts}
            ranks = int(self._ranks[index])
            site = Site(self._training, self.plan, index, ranks, self._rows, trained, self._routes, self._alone)
            self._sites[index] = site
        return site


def _marked(plan: Plan, adapters: Mapping[str, Trained]) -> Plan:
    """The plan, which tells the layers of these adapters to ask about dropout."""
    touches = list(plan.touches)
    for one in adapters.values():
        for index in one.dropout.paths:
            touches[index] |= DROP
    return replace(plan, touches=tuple(touches))
