"""The layer of a linear of which each process holds a share of A and of B (`patch(fully_sharded=True)`).

Of x each process takes its part of the inputs, and makes of it and its columns of A a part of A x. These parts, a few
numbers a token, go to all processes, and each adds them up in the same order; with its columns of B it adds its part of
the outputs. Of a linear that is split by its outputs, those are all outputs that it has; of one that is split by its
inputs they are some of its partial sum's, and the base's all-reduce brings them to the others.

The store has the rank rows of such a linear under a number of their own; all else that adapters do to it is the
`LoraLayer`'s as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arena.bits import TAIL
from ..arena.store import Store
from ..lowering import Cut
from ..ops import dispatch
from ..plan.plan import Plan
from .cuts import cut_of
from .linear import LoraLayer

_COPIED = 1 << 16  # elements of an input of which a copy tells whether it was written to


class Shard(NamedTuple):
    """A process's share of a linear's rank rows.

    Args:
        number: theirs in the store. `table`: their rows of its tables, int64 (slots, TABLE_WIDTH).
        cut: how the linear is split. `inputs`, `outputs`: this process's part, of what its own linear reads and gives.
    """

    number: int
    table: Tensor
    cut: Cut
    inputs: slice
    outputs: slice

    @classmethod
    def of(cls, number: int, table: Tensor, cut: Cut) -> Shard:
        """Of a linear that is split in this way, along both axes."""
        part, whole = slice(*cut.across[0]), slice(None)
        inputs, outputs = (part, whole) if cut.axis == "outputs" else (whole, part)
        return cls(number, table, cut, inputs, outputs)


def sharded_cut(module: nn.Module) -> Cut | None:
    """How `module` is split where its rank rows can be, along both axes; else None."""
    cut = cut_of(module) if isinstance(module, nn.Linear) else None
    if cut is None or cut.why:
        return None
    assert isinstance(module, nn.Linear)
    cut = cut.sharded(module.in_features if cut.axis == "outputs" else module.out_features)
    return cut if cut.across else None


class Read(NamedTuple):
    """What the layer with number `first` made for those that read the same input after it, `results`: number of their
    rank rows -> A x. `mark`: see `_mark`."""

    first: int
    input: Tensor
    mark: Any
    plan: Plan
    results: dict[int, Tensor]


class Shares:
    """What those layers of a model share.

    Args:
        store: the model's.

    `groups`: first layer's number -> the layers that read the same input after it (q, k, v; gate, up), learned as calls
    come. Their A x are exchanged together.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._world = dist.get_world_size()
        self._ranks: list[tuple[Plan, int, np.ndarray]] = []  # of the last plans: rows, and rank rows by module
        self.groups: dict[int, tuple[ShardedLayer, ...]] = {}

    def read(self, layer: ShardedLayer, x: Tensor, plan: Plan) -> Tensor:
        """A x of all processes, as `ops.phases.expand_` takes it. All of them call this alike."""
        state = layer._mlora
        scope, index = state.shared.active.get(), state.shard.number
        seen: Read | None = scope.read
        if seen is not None and seen.input is x and seen.plan is plan and _unwritten(x, seen.mark):
            if (ready := seen.results.pop(index, None)) is not None:
                return ready
            known = self.groups.get(seen.first, ())
            if layer not in known:
                self.groups[seen.first] = (*known, layer)
            return self._exchanged([layer], x, plan)[0]
        if seen is not None and seen.results:  # not asked for: their layers do not read what that one reads
            known = self.groups[seen.first]
            self.groups[seen.first] = tuple(one for one in known if one._mlora.shard.number not in seen.results)
        touches, group = plan.touches[index], [layer]
        if (mark := _mark(x)) is not None:
            for other in self.groups.get(index, ()):
                its = plan.touches[other._mlora.shard.number]
                if its and not (its ^ touches) & TAIL:  # it reads the same plan
                    group.append(other)
        own, *others = self._exchanged(group, x, plan)
        results = {other._mlora.shard.number: v for other, v in zip(group[1:], others, strict=True)}
        scope.read = None if mark is None else Read(index, x, mark, plan, results)
        return own

    def _exchanged(self, layers: Sequence[ShardedLayer], x: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """A x of each of the layers, in one exchange."""
        rows, ranks = self._rank_rows(plan)
        tokens = x.numel() // x.shape[-1] // rows
        sizes = [tokens * int(ranks[layer._mlora.shard.number]) for layer in layers]
        own = x.new_empty(sum(sizes), dtype=torch.promote_types(x.dtype, torch.float32))
        for layer, v in zip(layers, own.split(sizes), strict=True):
            state = layer._mlora
            words = plan.tensors[state.home]
            dispatch.shrink_(v, x[..., state.shard.inputs], state.arena, state.shard.table, words)
        parts = own.new_empty(self._world * len(own))
        dist.all_gather_into_tensor(parts, own)
        total, *others = parts.split(len(own))
        for part in others:  # in one order, whatever else is in the batch
            total += part
        return total.split(sizes)

    def _rank_rows(self, plan: Plan) -> tuple[int, np.ndarray]:
        for known, rows, ranks in self._ranks:
            if known is plan:
                return rows, ranks
        rows, ranks = self._store.rank_rows(plan.words)
        self._ranks = [(plan, rows, ranks), *self._ranks[:3]]  # with aLoRAs a call has more than one
        return rows, ranks


class ShardedLayer(LoraLayer):
    """Mixed in before a linear's class; see the module's docstring."""

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        if x is None:  # nn.Linear calls it `input`
            assert input is not None
            x = input
        y = super().forward(x)
        state = self._mlora
        shared, shard = state.shared, state.shard
        scope = shared.active.get()
        plan = scope.plan or shared.default
        touches = 0 if plan is None else plan.touches[shard.number]
        if plan is None or not touches:
            return y
        if touches & TAIL:
            plan = self._by_token(x, scope)
        self._check(x, plan)
        self._check_given(y, x)
        if x.numel():
            v = shared.shares.read(self, x, plan)
            dispatch.expand_(y[..., shard.outputs], v, state.arena, shard.table, plan.tensors[state.home])
        return y


def _mark(x: Tensor) -> Any:
    """What tells later whether x was written to; None where that would cost too much."""
    if not x.is_inference():
        return x._version
    return x.clone() if x.numel() <= _COPIED else None


def _unwritten(x: Tensor, mark: Any) -> bool:
    return torch.equal(x, mark) if isinstance(mark, Tensor) else bool(x._version == mark)
