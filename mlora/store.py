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
from typing import Any

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
BOTH = 32  # in a plan: some row changes what the base reads, and has a gain or a turn of what it gives
TAIL = 64  # on a row's last tokens only, from its invocation on (aLoRA)
TURN = 128  # of the output

_TURNED_BYTES = 1 << 18
_MORE_MEMORY = "patch(memory=...), mlora generate --memory"  # what an error says to do

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
        touches: one byte a module: LORA | GAIN | INPUT | SHIFT | HEAD | TAIL | TURN.
        heads: module number -> (offset of its weight, of its bias or -1, width) of a head or token embedding of another
            size, relative to the blob's start; the module's row in `rows` is empty.
        rests: whether any of the latter has a part.
        invocation: of an aLoRA, see `Delta`; it is that of every module with TAIL.
        slot, offset: where it is resident, or -1.
        pins: how many active routings use it.
    """

    blob: Tensor
    rows: np.ndarray
    touches: np.ndarray
    heads: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    rests: bool = field(default=False)
    invocation: tuple[int, ...] = ()
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
        self.placements = 0  # changes whenever something comes onto the device, moves there or leaves it
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
        scales = np.zeros(len(rows), dtype=np.float32)
        heads: dict[int, tuple[int, int, int]] = {}
        parts: list[Tensor] = []

        def number(part: Tensor) -> int:  # stands for the part's offset until all are known
            parts.append(part)
            return len(parts) - 1

        for index, delta in deltas.items():
            row, rest_row = rows[index]
            if delta.invocation:
                touches[index] |= TAIL
            if delta.replaces and delta.a is not None:
                heads[index] = number(delta.a), -1 if delta.shift is None else number(delta.shift), delta.rank
                touches[index] |= HEAD
                continue
            if delta.a is not None and delta.b is not None:
                row[layout.A], row[layout.B], row[layout.RANK] = number(delta.a), number(delta.b), delta.rank
                scales[index] = delta.scale
                touches[index] |= LORA
                if delta.b.shape[0] == delta.b.shape[1] and torch.equal(delta.b, torch.eye(delta.rank).to(delta.b)):
                    row[layout.WHOLE] = 1
            for column, bit, part in (
                (layout.GAIN, GAIN, delta.gain),
                (layout.IN_GAIN, INPUT, delta.in_gain),
                (layout.SHIFT, SHIFT, delta.shift),
            ):
                if part is not None:
                    row[column] = number(part)
                    touches[index] |= bit
                    if bit != SHIFT and (rest := _rest(part, self.arena.dtype)) is not None:
                        rest_row[column] = number(rest)
            for column, bit, turn in ((layout.TURN, TURN, delta.turn), (layout.IN_TURN, INPUT, delta.in_turn)):
                if turn is not None:
                    row[column] = number(turn.values)
                    row[column + 1] = layout.turn_shape(*turn.shape)
                    touches[index] |= bit
                    if (rest := _turn_rest(turn, self.arena.dtype)) is not None:
                        rest_row[column], rest_row[column + 1] = number(rest), row[column + 1]
        blob, offsets = self._lay_out(parts)
        for column in _OFFSETS:
            rows[..., column] = offsets[rows[..., column]]
        heads = {index: (int(offsets[a]), int(offsets[bias]), width) for index, (a, bias, width) in heads.items()}
        rows[:, 0, layout.SCALE] = scales.view(np.uint32)
        if not all_finite(blob):
            raise errors.AdapterError(
                f"{label}: some weights overflow {self.arena.dtype}, in which the model runs; patch with "
                "dtype=torch.float32 or torch.bfloat16"
            )
        rests = bool((rows[:, 1, _OFFSETS] >= 0).any())
        invocation = next((delta.invocation for delta in deltas.values() if delta.invocation), ())
        packed = Packed(blob, rows, touches, heads, rests, invocation)
        if packed.nbytes > self.capacity:
            raise errors.CapacityError(
                f"{label} needs {packed.nbytes:,} bytes; the arena has {self.capacity:,} ({_MORE_MEMORY})"
            )
        return packed

    def _lay_out(self, parts: Sequence[Tensor]) -> tuple[Tensor, np.ndarray]:
        """A blob of all parts, those of one shape and layout side by side, which takes a few copies in place of one a
        part; and the offset of each, with a last one, -1, for what is absent."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, part in enumerate(parts):
            alike.setdefault((part.shape, part.stride(), part.dtype), []).append(number)
        offsets = np.full(len(parts) + 1, -1, dtype=np.int64)
        end = 0
        for numbers in alike.values():
            size = parts[numbers[0]].numel()
            step = size + -size % self._align
            offsets[numbers] = np.arange(end, end + step * len(numbers), step)
            end += step * len(numbers)
        blob = torch.empty(end, dtype=self.arena.dtype, pin_memory=self.arena.is_cuda)
        for numbers in alike.values():
            _copy_alike([parts[number] for number in numbers], blob[offsets[numbers[0]] :], self._align)
        return blob, offsets

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
            if not all(packed.resident for packed in wanted):
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
                f"{self.capacity:,} ({_MORE_MEMORY})"
            )
        if len(keep) > self.slots:
            raise errors.CapacityError(
                f"this batch needs {len(keep)} adapters on the device; there are {self.slots} slots "
                "(patch(max_adapters=...), mlora generate --max-adapters)"
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
                    f"running batches have pinned; {self._allocator.free_size * self.itemsize:,} bytes are free "
                    f"({_MORE_MEMORY})"
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
            self.placements += 1

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
        self.placements += 1


def _rest(part: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What rounding to `dtype` takes off g - 1, where that is more than rounding g itself would; else None. It never
    is unless some g is below a half."""
    rest = part - part.to(dtype).to(part.dtype)
    beyond = rest.abs() > torch.finfo(dtype).eps / 2 * (1 + part).abs()
    return rest if beyond.any() else None


def _turn_rest(turn: Turn, dtype: torch.dtype) -> Tensor | None:
    """The same of a turn's values, off the diagonal of which it never is."""
    return None if _rest(turn.diagonal, dtype) is None else turn.values - turn.values.to(dtype).to(turn.values.dtype)


def _copy_alike(parts: list[Tensor], to: Tensor, align: int) -> None:
    """Copy parts of one shape and layout to the start of `to`, each padded with zeros to a multiple of `align`.

    LoRA's B, (out, rank) in files, come transposed. They are copied as they lie first, so many at a time that they
    stay in the cache, and turned together: a quarter of the time of one by one."""
    first = parts[0]
    size = first.numel()
    padded = to[: (size + -size % align) * len(parts)].view(len(parts), -1)
    padded[:, size:] = 0
    places = padded[:, :size].view(len(parts), *first.shape)
    if first.is_contiguous() or not first.t().is_contiguous():
        torch.stack(parts, out=places)
        return
    some = max(1, _TURNED_BYTES // first.nbytes)
    for start in range(0, len(parts), some):
        lying = torch.stack([part.t() for part in parts[start : start + some]])
        places[start : start + some] = lying.transpose(1, 2)
