"""The arena: every resident adapter in one contiguous buffer, and the tables that point into it.

An adapter is packed once, when it is registered, into one contiguous blob on the host; becoming
resident is one copy of that blob and one write of its rows in the tables. Nothing is padded to a
maximum rank: a blob holds each part at its true size, aligned to 64 bytes.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import errors
from .adapter import all_finite
from .lowering import Delta, Turn
from .ops import layout

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every vector load of the kernels

# What an adapter does to a module, as bits of a byte.
LORA, GAIN, INPUT, SHIFT, HEAD = 1, 2, 4, 8, 16  # INPUT: a gain or a turn of what the base reads
TURN = 64  # of the output
BOTH = 32  # in a plan: some row changes what the base reads, and has a gain or a turn of what it gives

_OFFSETS = (layout.A, layout.B, layout.GAIN, layout.IN_GAIN, layout.SHIFT, layout.TURN, layout.IN_TURN)


class Allocator:
    """First fit over `capacity` elements. Spans are disjoint; free neighbours are one hole.

    `alloc` and `free` take O(number of spans). Offsets and sizes are in elements; sizes are whatever
    the caller asks for, so alignment is kept by asking for aligned sizes only.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.spans: list[tuple[int, int]] = []  # (offset, size), sorted

    @property
    def free_size(self) -> int:
        return self.capacity - sum(size for _, size in self.spans)

    def alloc(self, size: int) -> int | None:
        """The lowest offset where `size` elements fit, now taken; None where there is no such hole."""
        end = 0
        for index, (offset, taken) in enumerate([*self.spans, (self.capacity, 0)]):
            if offset - end >= size:
                self.spans.insert(index, (end, size))
                return end
            end = offset + taken
        return None

    def free(self, offset: int) -> None:
        """Give back the span that `alloc` returned as `offset`."""
        index = bisect_left(self.spans, (offset, 0))
        if index == len(self.spans) or self.spans[index][0] != offset:
            raise ValueError(f"no span starts at {offset}")
        del self.spans[index]

    def compact(self, fixed: Iterable[int] = ()) -> list[tuple[int, int, int]]:
        """Slide spans to the lowest offsets, except those at the offsets `fixed`.

        Returns the moves (from, to, size) in an order in which none overwrites a span that has yet to
        move; source and target of one move may overlap.
        """
        pinned = set(fixed)
        moves, spans, end = [], [], 0
        for offset, size in self.spans:
            if offset not in pinned and offset != end:
                moves.append((offset, end, size))
                offset = end
            spans.append((offset, size))
            end = offset + size
        self.spans = spans
        return moves


@dataclass
class Packed:
    """A registered adapter.

    Args:
        blob: 1-D host tensor in the arena's dtype.
        rows: int64 (modules, 2, TABLE_WIDTH), offsets relative to the blob's start: the adapter's own row of each
            module's table, and that of the rests of its gains and turns.
        touches: one byte a module: LORA | GAIN | INPUT | SHIFT | HEAD | TURN.
        heads: module number -> (offset of its weight, of its bias or -1, width) of a head of another size, relative to
            the blob's start; the module's row in `rows` is empty.
        rests: whether any of the latter has a part.
        slot, offset: where it is resident, or -1.
        pins: how many active routings use it.
    """

    blob: Tensor
    rows: np.ndarray
    touches: np.ndarray
    heads: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    rests: bool = field(default=False)
    slot: int = field(default=-1)
    offset: int = field(default=-1)
    pins: int = field(default=0)

    @property
    def nbytes(self) -> int:
        return self.blob.numel() * self.blob.element_size()

    @property
    def resident(self) -> bool:
        return self.slot >= 0


class Store:
    """Named adapters on the host, as many of them as fit in the arena on the device.

    Args:
        device, dtype: of the arena.
        capacity: its size in bytes.
        modules: number of modules, in the order in which `register` numbers them.
        slots: how many adapters can be resident at once.

    `arena` (capacity elements of `dtype`) and `tables` (int64, (modules, 2 * slots, TABLE_WIDTH)) keep
    their addresses for good: loading and evicting change contents only, which is what lets compiled
    and captured graphs outlive them. All methods are thread-safe.

    A gain far below 1 has few of its digits in a 16-bit g - 1. Where that matters, what rounding took off
    is kept too, its rest (or a turn's), as the only part of a second row, `slots` rows on, which recipes name
    beside the first: to kernels that sum the gains of a recipe's terms it is one more term.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, capacity: int, modules: int, slots: int) -> None:
        self.itemsize = dtype.itemsize
        self._align = ALIGNMENT // self.itemsize
        elements = capacity // ALIGNMENT * self._align
        self.arena = torch.empty(elements, dtype=dtype, device=device)
        empty = np.full((modules, 2 * slots, layout.TABLE_WIDTH), -1, dtype=np.int64)
        empty[..., layout.RANK] = 0
        empty[..., layout.SCALE] = 0
        self.tables = torch.from_numpy(empty).to(device)
        self._empty_rows = empty[:, :2].copy()
        self._allocator = Allocator(elements)
        self._free_slots = list(range(slots))[::-1]
        self._adapters: OrderedDict[str, Packed] = OrderedDict()  # least recently used first
        self._lock = threading.RLock()

    @property
    def capacity(self) -> int:
        """Bytes of the arena."""
        return self.arena.numel() * self.itemsize

    @property
    def used(self) -> int:
        """Bytes of the arena that hold resident adapters."""
        return self.capacity - self._allocator.free_size * self.itemsize

    @property
    def slots(self) -> int:
        return self.tables.shape[1] // 2

    def __getitem__(self, name: str) -> Packed:
        return self._adapters[name]

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def pack(self, deltas: Mapping[int, Delta], label: str) -> Packed:
        """Lay the parts of an adapter out in one host blob. `deltas`: module number -> delta.

        Raises:
            AdapterError: a value is finite in the adapter and not in the arena's dtype.
            CapacityError: the blob is larger than the arena.
        """
        rows = self._empty_rows.copy()
        touches = np.zeros(len(rows), dtype=np.uint8)
        parts: list[Tensor] = []
        heads: dict[int, tuple[int, int, int]] = {}
        padding = torch.zeros(self._align, dtype=self.arena.dtype)
        end = 0

        def place(part: Tensor) -> int:
            nonlocal end
            start, size = end, part.numel()
            parts.append(part)
            if gap := -size % self._align:
                parts.append(padding[:gap])
            end = start + size + gap
            return start

        for index, delta in deltas.items():
            row, rest_row = rows[index]
            if delta.replaces and delta.a is not None:
                heads[index] = place(delta.a), -1 if delta.shift is None else place(delta.shift), delta.rank
                touches[index] |= HEAD
                continue
            if delta.a is not None and delta.b is not None:
                row[layout.A], row[layout.B], row[layout.RANK] = place(delta.a), place(delta.b), delta.rank
                row[layout.SCALE] = np.float32(delta.scale).view(np.uint32)
                touches[index] |= LORA
                if delta.b.shape[0] == delta.b.shape[1] and torch.equal(delta.b, torch.eye(delta.rank).to(delta.b)):
                    row[layout.WHOLE] = 1
            for column, bit, part in (
                (layout.GAIN, GAIN, delta.gain),
                (layout.IN_GAIN, INPUT, delta.in_gain),
                (layout.SHIFT, SHIFT, delta.shift),
            ):
                if part is not None:
                    row[column] = place(part)
                    touches[index] |= bit
                    if bit != SHIFT and (rest := _rest(part, self.arena.dtype)) is not None:
                        rest_row[column] = place(rest)
            for column, bit, turn in ((layout.TURN, TURN, delta.turn), (layout.IN_TURN, INPUT, delta.in_turn)):
                if turn is not None:
                    row[column] = place(turn.values)
                    row[column + 1] = layout.turn_shape(*turn.shape)
                    touches[index] |= bit
                    if (rest := _turn_rest(turn, self.arena.dtype)) is not None:
                        rest_row[column], rest_row[column + 1] = place(rest), row[column + 1]
        blob = torch.empty(end, dtype=self.arena.dtype, pin_memory=self.arena.is_cuda)
        torch.cat(_flat(parts) or [blob], out=blob)
        if not all_finite(blob):
            raise errors.AdapterError(
                f"{label}: some weights overflow {self.arena.dtype}, in which the model runs; patch with "
                "dtype=torch.float32 or torch.bfloat16"
            )
        rests = bool((rows[:, 1, _OFFSETS] >= 0).any())
        packed = Packed(blob, rows, touches, heads, rests)
        if packed.nbytes > self.capacity:
            raise errors.CapacityError(
                f"{label} needs {packed.nbytes:,} bytes; the arena has {self.capacity:,} (patch(memory=...))"
            )
        return packed

    def register(self, name: str, packed: Packed) -> None:
        """Add a packed adapter under a new name; it becomes resident if it fits without an eviction."""
        with self._lock:
            self._adapters[name] = packed
            if self._free_slots:
                self._place(packed)

    def unregister(self, name: str) -> None:
        """Forget an adapter that no routing uses."""
        with self._lock:
            self._evict(self._adapters[name])
            del self._adapters[name]

    def acquire(self, names: Sequence[str]) -> None:
        """Make all of `names` resident and pin them until `release`. All of them or none.

        Raises:
            CapacityError: they cannot be resident together beside what other routings have pinned.
        """
        with self._lock:
            wanted = [self._adapters[name] for name in names]
            self._check_fits(wanted)
            keep = {id(packed) for packed in wanted}
            for packed in wanted:
                if not packed.resident:
                    self._make_resident(packed, keep)
            for name, packed in zip(names, wanted, strict=True):  # pinned last: until then they may move
                packed.pins += 1
                self._adapters.move_to_end(name)

    def release(self, names: Sequence[str]) -> None:
        """Undo one `acquire` of the same names."""
        with self._lock:
            for name in names:
                self._adapters[name].pins -= 1

    def terms(self, recipe: Iterable[tuple[str, float]]) -> tuple[tuple[int, float], ...]:
        """(slot, weight) of all that a recipe of resident adapters, (name, weight) each, sums."""
        named = [(self._adapters[name], weight) for name, weight in recipe]
        rests = [(packed.slot + self.slots, weight) for packed, weight in named if packed.rests]
        return (*((packed.slot, weight) for packed, weight in named), *rests)

    def _check_fits(self, wanted: Sequence[Packed]) -> None:
        keep = {id(p): p for p in self._adapters.values() if p.pins}
        others = sum(p.nbytes for p in keep.values())
        keep.update((id(p), p) for p in wanted)
        needed = sum(p.nbytes for p in keep.values())
        beside = f", {others:,} of them for routings that are active already" if others else ""
        if needed > self.capacity:
            raise errors.CapacityError(
                f"this batch needs {needed:,} bytes of adapters on the device{beside}; the arena has "
                f"{self.capacity:,} (patch(memory=...))"
            )
        if len(keep) > self.slots:
            raise errors.CapacityError(
                f"this batch needs {len(keep)} adapters on the device; there are {self.slots} slots "
                "(patch(max_adapters=...))"
            )

    def _make_resident(self, packed: Packed, keep: Set[int]) -> None:
        """Place `packed`, evicting what was used longest ago except those whose id is in `keep`."""
        others = list(self._adapters.values())
        idle = (p for p in others if p.resident and not p.pins and id(p) not in keep)
        while not (self._free_slots and self._place(packed)):
            victim = next(idle, None)
            if victim is None:
                # Pinned adapters do not move, so the holes between them can stay too small.
                raise errors.CapacityError(
                    f"an adapter of {packed.nbytes:,} bytes finds no contiguous room between the adapters that "
                    f"running batches have pinned; {self._allocator.free_size * self.itemsize:,} bytes are free"
                )
            self._evict(victim)

    def _place(self, packed: Packed) -> bool:
        offset = self._allocator.alloc(packed.blob.numel())
        if offset is None and self._allocator.free_size >= packed.blob.numel():
            self._compact()
            offset = self._allocator.alloc(packed.blob.numel())
        if offset is None:
            return False
        packed.slot, packed.offset = self._free_slots.pop(), offset
        self.arena[offset : offset + packed.blob.numel()].copy_(packed.blob, non_blocking=True)
        self._write_rows(packed)
        return True

    def _evict(self, packed: Packed) -> None:
        if packed.resident:
            self._allocator.free(packed.offset)
            self._free_slots.append(packed.slot)
            self.tables[:, packed.slot :: self.slots] = torch.from_numpy(self._empty_rows).to(self.tables.device)
            packed.slot = packed.offset = -1

    def _compact(self) -> None:
        resident = {p.offset: p for p in self._adapters.values() if p.resident and p.blob.numel()}
        for source, target, size in self._allocator.compact(o for o, p in resident.items() if p.pins):
            packed = resident[source]
            self.arena[target : target + size].copy_(packed.blob, non_blocking=True)
            packed.offset = target
            self._write_rows(packed)

    def _write_rows(self, packed: Packed) -> None:
        rows = packed.rows.copy()
        for column in _OFFSETS:
            rows[..., column] += np.where(rows[..., column] >= 0, packed.offset, 0)
        self.tables[:, packed.slot :: self.slots] = torch.from_numpy(rows).to(self.tables.device)


def _rest(part: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What rounding to `dtype` takes off g - 1, where that is more than rounding g itself would; else None. It never
    is unless some g is below a half."""
    rest = part - part.to(dtype).to(part.dtype)
    beyond = rest.abs() > torch.finfo(dtype).eps / 2 * (1 + part).abs()
    return rest if beyond.any() else None


def _turn_rest(turn: Turn, dtype: torch.dtype) -> Tensor | None:
    """The same of a turn's values, off the diagonal of which it never is."""
    return None if _rest(turn.diagonal, dtype) is None else turn.values - turn.values.to(dtype).to(turn.values.dtype)


def _flat(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts as vectors. Those of one shape that lie transposed, as LoRA's B do in files, are copied at once, in a
    fifth of the time."""
    transposed: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, part in enumerate(parts):
        if not part.is_contiguous() and part.t().is_contiguous():
            transposed.setdefault((part.shape, part.dtype), []).append(index)
    flat = list(parts)
    for indices in transposed.values():
        stacked = torch.stack([parts[index].t() for index in indices]).transpose(1, 2).contiguous()
        for index, part in zip(indices, stacked, strict=True):
            flat[index] = part
    return [part.reshape(-1) for part in flat]
