"""The arena: every resident adapter in one contiguous buffer, and the tables that point into it.

An adapter is packed once, when it is registered (`pack.py`); becoming resident is one copy of its blob and one write of
its rows in the tables.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import torch

from .. import errors, layout
from ..lowering import Delta
from ..lowering.delta import Matrix
from ..ops import dispatch
from .allocator import Allocator
from .memory import Room, fixed, give_back, reserve
from .pack import ALIGNMENT, OFFSETS, Packed, numel_of, pack

_MORE_MEMORY = "patch(memory=...), or --memory of the commands"  # what an error says to do


class Store:
    """Named adapters on the host, as many of them as fit in the arena on the device.

    Args:
        device, dtype: of the arena.
        room: how many bytes it has, and how they are used; or just their number.
        modules: number of modules, in the order in which `register` numbers them.
        slots: how many adapters can be resident at once.

    `arena` (capacity elements of `dtype`) and `tables` (int64, (modules, 2 * slots, TABLE_WIDTH)) keep
    their addresses for good: loading and evicting change contents only, which is what lets compiled
    and captured graphs outlive them. All methods are thread-safe.

    A gain far below 1 has few of its digits in a 16-bit g - 1. Where that matters, what rounding took off
    is kept too, its rest (or a turn's), as the only part of a second row, `slots` rows on, which recipes name
    beside the first: to kernels that sum the gains of a recipe's terms it is one more term.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, room: Room | int, modules: int, slots: int) -> None:
        self.itemsize = dtype.itemsize
        self.room = fixed(room) if isinstance(room, int) else room
        self.arena, self._pages = reserve(self.room.size // ALIGNMENT * ALIGNMENT, dtype, device)
        empty = np.full((modules, 2 * slots, layout.TABLE_WIDTH), -1, dtype=np.int64)
        empty[..., layout.RANK] = 0
        empty[..., layout.SCALE] = 0
        self.tables = torch.from_numpy(empty).to(device)
        self._empty_rows = empty[:, :2].copy()
        # Compiled code and captured graphs read the arena by the kernels that were chosen when it was made.
        self._implied = dispatch.backend(device, dtype) in ("cpu", "reference")
        self._allocator = Allocator(self.arena.numel())
        self._free_slots = list(range(slots))[::-1]
        self._adapters: OrderedDict[str, Packed] = OrderedDict()  # least recently used first
        self.changes = 0  # how often the numbers of an adapter that is being trained were found changed
        self._exchanged: torch.Tensor | None = None
        self.placements = 0  # changes whenever something comes onto the device, moves there or leaves it
        self.registered = 0  # how many adapters ever were
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

    @property
    def exchanged(self) -> torch.Tensor:
        """`tables` with each module turned round (`layout.EXCHANGED`), kept up from the first time on."""
        with self._lock:
            if self._exchanged is None:
                self._exchanged = _exchange(self.tables)
            return self._exchanged

    def __getitem__(self, name: str) -> Packed:
        return self._adapters[name]

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def pack(self, deltas: Mapping[int, Delta], label: str, changing: bool = False) -> Packed:
        """Lay the parts of an adapter out in one host blob. `deltas`: module number -> delta; `changing`: see
        `pack.pack`.

        Raises:
            AdapterError: a value is finite in the adapter and not in the arena's dtype.
            CapacityError: the blob is larger than the arena.
        """
        implied = self._implied and not changing  # parameters that are whole matrices are written beside theirs
        packed = pack(deltas, self._empty_rows, self.arena.dtype, self.arena.is_cuda, label, changing, implied)
        if packed.nbytes > self.capacity:
            raise errors.CapacityError(
                f"{label} needs {packed.nbytes:,} bytes; the arena has {self.capacity:,} ({_MORE_MEMORY})"
            )
        return packed

    def nbytes(self, matrix: Matrix) -> int:
        """Of a whole matrix on the device."""
        return numel_of(matrix, self._implied) * self.itemsize

    def register(self, name: str, packed: Packed) -> None:
        """Add a packed adapter under a new name; it becomes resident if what is ready of the arena has room for it."""
        with self._lock:
            self._adapters[name] = packed
            self.registered += 1
            packed.number = self.registered
            if self._free_slots and self.used + packed.nbytes <= self.room.ready:
                self._place(packed)

    def unregister(self, name: str) -> None:
        """Forget an adapter, as soon as no routing uses it."""
        with self._lock:
            self._adapters[name].retired = True
            self._forget_unused(name)

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
                if packed.source is not None and packed.source.changed:
                    self._fill(packed)

    def release(self, names: Sequence[str]) -> None:
        """Undo one `acquire` of the same names."""
        with self._lock:
            for name in names:
                self._adapters[name].pins -= 1
                self._forget_unused(name)

    def _forget_unused(self, name: str) -> None:
        packed = self._adapters[name]
        if packed.pins or not packed.retired:
            return
        at = packed.offset
        self._evict(packed)
        del self._adapters[name]
        if self._pages is not None and at >= 0:
            start, end = (edge * self.itemsize for edge in self._allocator.hole(at))
            give_back(self._pages, max(start, self.room.ready), end)

    def touched(self, names: Iterable[str]) -> list[int]:
        """The numbers of the modules that any of these adapters changes."""
        with self._lock:
            touches = [self._adapters[name].touches for name in names]
        return np.flatnonzero(np.bitwise_or.reduce(touches)).tolist() if touches else []

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
        size = packed.blob.numel()
        offset = self._allocator.alloc(size) if size else 0
        if offset is None and self._allocator.free_size >= size:
            self._compact()
            offset = self._allocator.alloc(size)
        if offset is None:
            return False
        packed.slot, packed.offset = self._free_slots.pop(), offset
        self._fill(packed)
        self._write_rows(packed)
        return True

    def _fill(self, packed: Packed) -> None:
        """Bring its numbers to where it is."""
        place = self.arena[packed.offset : packed.offset + packed.blob.numel()]
        if packed.source is None:
            place.copy_(packed.blob, non_blocking=True)
            return
        if packed.source.changed:
            packed.version += 1
            self.changes += 1
        packed.source.write(place)

    def _evict(self, packed: Packed) -> None:
        if packed.resident:
            if packed.blob.numel():
                self._allocator.free(packed.offset)
            self._free_slots.append(packed.slot)
            self._set_rows(packed.slot, self._empty_rows)
            packed.slot = packed.offset = -1
            self.placements += 1

    def _compact(self) -> None:
        resident = {p.offset: p for p in self._adapters.values() if p.resident and p.blob.numel()}
        for source, target, _ in self._allocator.compact(o for o, p in resident.items() if p.pins):
            packed = resident[source]
            packed.offset = target
            self._fill(packed)
            self._write_rows(packed)

    def _write_rows(self, packed: Packed) -> None:
        rows = packed.rows.copy()
        for column in OFFSETS:
            rows[..., column] += np.where(rows[..., column] >= 0, packed.offset, 0)
        self._set_rows(packed.slot, rows)
        self.placements += 1

    def _set_rows(self, slot: int, rows: np.ndarray) -> None:
        """Both rows of a slot, (modules, 2, TABLE_WIDTH)."""
        written = torch.from_numpy(rows).to(self.tables.device)
        self.tables[:, slot :: self.slots] = written
        if self._exchanged is not None:
            self._exchanged[:, slot :: self.slots] = _exchange(written)


def _exchange(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a table, (..., TABLE_WIDTH), of the modules turned round."""
    out = torch.full_like(rows, -1)
    for column, source in layout.EXCHANGED.items():
        out[..., column] = rows[..., source]
    return out
