"""The arena: every resident adapter in one contiguous buffer a device, and the tables that point into it.

An adapter is packed once, when it is registered (`pack.py`); becoming resident is one copy a device of its blob and one
write of its rows in the tables.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import numpy as np
import torch

from .. import errors, layout
from ..lowering import Delta
from ..lowering.delta import Matrix
from .host import Block, Host
from .memory import Room
from .pack import Packed, numel_of, pack
from .space import Space
from .streams import Streams

_PLACED = -1  # no device's number
_MORE_MEMORY = "patch(memory=...), or --memory of the commands"  # what an error says to do


class Store:
    """Named adapters on the host, as many of them as fit in the arenas of the devices.

    Args:
        devices: on which modules are called.
        dtype: of the arenas.
        rooms: of each device, how many bytes its arena has, and how they are used; or just their number.
        homes: of each module, in the order in which `register` numbers them, the number of its device.
        slots: how many adapters can be resident at once.
        host_memory: bytes that adapters may take on the host, None for no bound.

    Each device has a `Space`, an arena and the tables of the modules that are called there; none holds what another's
    modules need. A resident adapter has one slot, the same on all devices, so that a plan's words mean the same on each
    of them; and it is resident wholly, on every device that needs a part of it, or not at all. Arenas and tables keep
    their addresses for good: loading and evicting change contents only, which is what lets compiled and captured graphs
    outlive them. `host` counts what adapters take there; `empty_rows` are the `Packed.rows` of one without parts. All
    methods are thread-safe.

    A gain far below 1 has few of its digits in a 16-bit g - 1. Where that matters, what rounding took off
    is kept too, its rest (or a turn's), as the only part of a second row, `slots` rows on, which recipes name
    beside the first: to kernels that sum the gains of a recipe's terms it is one more term.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        rooms: Sequence[Room | int],
        homes: Sequence[int],
        slots: int,
        host_memory: int | None = None,
    ) -> None:
        self.dtype = dtype
        self.homes = tuple(homes)
        self.slots = slots
        empty = np.full((len(homes), 2 * slots, layout.TABLE_WIDTH), -1, dtype=np.int64)
        empty[..., layout.RANK] = 0
        empty[..., layout.SCALE] = 0
        self.empty_rows = empty[:, :2].copy()
        pin = any(device.type == "cuda" for device in devices)
        self.host = Host(dtype, pin, self.empty_rows.nbytes + len(homes), host_memory)
        own = [[index for index, home in enumerate(homes) if home == device] for device in range(len(devices))]
        self.spaces = tuple(
            Space(device, dtype, room, modules if len(devices) > 1 else None, empty)
            for device, room, modules in zip(devices, rooms, own, strict=True)
        )
        self._local = {index: local for modules in own for local, index in enumerate(modules)}
        self._streams = Streams(devices)
        self._free_slots = list(range(slots))[::-1]
        self._adapters: OrderedDict[str, Packed] = OrderedDict()  # least recently used first
        self.changes = 0  # how often the numbers of an adapter that is being trained were found changed
        self.placements = 0  # changes whenever something comes onto the devices, moves there or leaves them
        self.registered = 0  # how many adapters ever were
        self._lock = threading.RLock()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(space.device for space in self.spaces)

    @property
    def modules(self) -> int:
        """How many there are."""
        return len(self.homes)

    @property
    def form(self) -> str:
        """Equal where blobs are laid out alike."""
        return f"{self.dtype}, {self.homes}, {[space.implied for space in self.spaces]}"

    @property
    def used(self) -> int:
        """Bytes of all arenas that hold resident adapters."""
        return sum(space.used for space in self.spaces)

    def table(self, index: int) -> torch.Tensor:
        """A module's rows, int64 (2 * slots, TABLE_WIDTH), on its device."""
        return self.spaces[self.homes[index]].tables[self._local[index]]

    def exchanged(self, index: int) -> torch.Tensor:
        """`table` of the module turned round (`layout.EXCHANGED`)."""
        with self._lock:
            return self.spaces[self.homes[index]].exchanged[self._local[index]]

    def offset(self, packed: Packed, index: int, offset: int) -> int:
        """Where what a module has at an offset of a resident adapter's blob lies in the arena of its device."""
        return offset + packed.shift(self.homes[index])

    def __getitem__(self, name: str) -> Packed:
        return self._adapters[name]

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def pack(self, deltas: Mapping[int, Delta], label: str, changing: bool = False) -> Packed:
        """Lay the parts of an adapter out in one host blob. `deltas`: module number -> delta; `changing`: see
        `pack.pack`.

        Raises:
            AdapterError: a value is finite in the adapter and not in the arena's dtype.
            CapacityError: the blob is larger than the arena, or finds no room on the host.
        """
        # Parameters that are whole matrices are written beside their identities.
        implied = [space.implied and not changing for space in self.spaces]
        return self.fill(
            label,
            lambda memory: pack(deltas, self.empty_rows, self.dtype, memory, label, self.homes, implied, changing),
        )

    def fill(self, label: str, make: Callable[[Callable[[int], torch.Tensor]], Packed]) -> Packed:
        """What `make` packs into a blob that it asks for by the number of its elements. It counts on the host until it
        was registered and is forgotten, or is discarded. Raises what `make` does, and as `pack`."""
        blocks: list[Block] = []

        def memory(numel: int) -> torch.Tensor:
            blocks.append(self.host.block(numel, label))
            return blocks[-1].blob

        try:
            packed = make(memory)
            for device, space in enumerate(self.spaces):
                needed = packed.size(device) * self.dtype.itemsize
                if needed > space.capacity:
                    raise errors.CapacityError(
                        f"{label} needs {needed:,} bytes on {space.device}; the arena has {space.capacity:,} "
                        f"({_MORE_MEMORY})"
                    )
        except BaseException:
            for block in blocks:
                self.host.give_back(block.nbytes, block.memory)
            raise
        (block,) = blocks
        packed.held, packed.memory = block.nbytes, block.memory
        return packed

    def keep(self, packed: Packed, nbytes: int, label: str) -> None:
        """Count what is kept on the host beside its blob; raises as `pack`."""
        self.host.count(nbytes, label)
        packed.held += nbytes

    def discard(self, packed: Packed) -> None:
        """What was packed and is not registered does not count any more."""
        self.host.give_back(packed.held, packed.memory)
        packed.held, packed.memory = 0, None

    def nbytes(self, matrix: Matrix, index: int) -> int:
        """Of a whole matrix of a module on its device."""
        return numel_of(matrix, self.spaces[self.homes[index]].implied) * self.dtype.itemsize

    def register(self, name: str, packed: Packed, number: int = 0) -> None:
        """Add a packed adapter under a new name; it becomes resident if what is ready of the arenas has room for it.
        `number`: that of one that was registered before and is the same."""
        with self._lock:
            self._adapters[name] = packed
            self.registered += not number
            packed.number = number or self.registered
            itemsize = self.dtype.itemsize
            ready = all(s.used + packed.size(at) * itemsize <= s.room.ready for at, s in enumerate(self.spaces))
            if self._free_slots and ready:
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
            if names:
                self._streams.follow()
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

    def bring(self, names: Sequence[str]) -> None:
        """Make all of `names` resident, beside what calls compute, and leave them to whoever needs the room; raises as
        `acquire`."""
        with self._lock, self._streams.beside():
            self.acquire(names)
            self.release(names)

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
        places = list(packed.offsets)
        self._evict(packed)
        del self._adapters[name]
        for space, at in zip(self.spaces, places, strict=True):
            if at >= 0:
                space.give_back(at)
        self.discard(packed)

    def idle(self) -> list[str]:
        """The names of those that no routing uses, of which the first was used longest ago."""
        with self._lock:
            return [name for name, packed in self._adapters.items() if not packed.pins]

    def touched(self, names: Iterable[str]) -> list[int]:
        """The numbers of the modules that any of these adapters changes."""
        with self._lock:
            touches = [self._adapters[name].touches for name in names]
        return np.flatnonzero(np.bitwise_or.reduce(touches)).tolist() if touches else []

    def rank_rows(self, words: np.ndarray) -> tuple[int, np.ndarray]:
        """Of a plan's words (`layout`): its rows, and of each module how many rank rows all of them have together."""
        rows, routes, terms = words[:3].tolist()
        if not routes:
            return max(rows, 1), np.zeros(self.modules, dtype=np.int64)
        at = layout.PLAN_HEADER
        row_start = words[at : at + routes + 1]
        at += routes + 1 + rows
        term_start = words[at : at + routes + 1]
        at += routes + 1
        slots = words[at : at + terms].tolist()
        ranks = np.zeros((self.modules, terms), dtype=np.int64)
        for space in self.spaces:
            ranks[space.own] = space.tables[:, slots, layout.RANK].cpu().numpy()
        return rows, ranks @ np.repeat(np.diff(row_start), np.diff(term_start)).astype(np.int64)

    def terms(self, recipe: Iterable[tuple[str, float]]) -> tuple[tuple[int, float], ...]:
        """(slot, weight) of all that a recipe of resident adapters, (name, weight) each, sums."""
        named = [(self._adapters[name], weight) for name, weight in recipe]
        rests = [(packed.slot + self.slots, weight) for packed, weight in named if packed.rests]
        return (*((packed.slot, weight) for packed, weight in named), *rests)

    def _check_fits(self, wanted: Sequence[Packed]) -> None:
        pinned = {id(p): p for p in self._adapters.values() if p.pins}
        keep = {**pinned, **{id(p): p for p in wanted}}
        for device, space in enumerate(self.spaces):
            others, needed = (sum(p.size(device) for p in of.values()) * self.dtype.itemsize for of in (pinned, keep))
            beside = f", {others:,} of them for routings that are active already" if others else ""
            if needed > space.capacity:
                raise errors.CapacityError(
                    f"this batch needs {needed:,} bytes of adapters on {space.device}{beside}; the arena has "
                    f"{space.capacity:,} ({_MORE_MEMORY})"
                )
        if len(keep) > self.slots:
            raise errors.CapacityError(
                f"this batch needs {len(keep)} adapters on the device; there are {self.slots} slots "
                "(patch(max_adapters=...), mlora generate --max-adapters)"
            )

    def _make_resident(self, packed: Packed, keep: Set[int]) -> None:
        """Place `packed`, evicting what was used longest ago except those whose id is in `keep`, and those that hold
        nothing on the device whose room is short."""
        idle = [p for p in self._adapters.values() if p.resident and not p.pins and id(p) not in keep]
        while True:
            short = self._place(packed) if self._free_slots else None
            if short == _PLACED:
                return
            victim = next((p for p in idle if short is None or p.size(short)), None)
            if victim is None:
                # Pinned adapters do not move, so the holes between them can stay too small.
                assert short is not None  # slots were counted before
                space = self.spaces[short]
                raise errors.CapacityError(
                    f"an adapter of {packed.size(short) * self.dtype.itemsize:,} bytes on {space.device} finds no "
                    f"contiguous room between the adapters that running batches have pinned; {space.free:,} bytes are "
                    f"free ({_MORE_MEMORY})"
                )
            idle = [p for p in idle if p is not victim]
            self._evict(victim)

    def _place(self, packed: Packed) -> int:
        """Bring it onto every device, or onto none. Returns the number of the first one that has no room for its part,
        else `_PLACED`."""
        self._streams.follow()
        short = self._allocate(packed)
        if short != _PLACED:
            return short
        packed.slot = self._free_slots.pop()
        try:
            self._fill(packed)
            for device in range(len(self.spaces)):
                self._write_rows(packed, device)
        except BaseException:
            self._evict(packed)
            raise
        self.placements += 1
        return _PLACED

    def _allocate(self, packed: Packed) -> int:
        """As `_place` returns: room for its part on every device, or on none."""
        try:
            for device, space in enumerate(self.spaces):
                size = packed.size(device)
                offset = space.allocator.alloc(size) if size else 0
                if offset is None and space.allocator.free_size >= size:
                    self._compact(device)
                    offset = space.allocator.alloc(size)
                if offset is None:
                    self._free(packed)
                    return device
                packed.offsets[device] = offset
        except BaseException:
            self._free(packed)
            raise
        return _PLACED

    def _free(self, packed: Packed) -> None:
        for device, space in enumerate(self.spaces):
            if packed.offsets[device] >= 0 and packed.size(device):
                space.allocator.free(packed.offsets[device])
            packed.offsets[device] = -1

    def _fill(self, packed: Packed, device: int | None = None) -> None:
        """Bring its numbers to where it is: to all devices, or to one."""
        places = [s.place(packed.offsets[at], packed.size(at)) for at, s in enumerate(self.spaces)]
        if packed.source is None:
            for at, place in enumerate(places):
                if device is None or device == at:
                    place.copy_(packed.blob[packed.start(at) : packed.cuts[at]], non_blocking=True)
            return
        if packed.source.changed:
            packed.version += 1
            self.changes += 1
        packed.source.write(places)

    def _evict(self, packed: Packed) -> None:
        if packed.resident:
            self._streams.follow()
            slot, packed.slot = packed.slot, -1
            self._free(packed)
            self._free_slots.append(slot)
            for space in self.spaces:
                space.write(slot, self.empty_rows, 0)
            self.placements += 1

    def _compact(self, device: int) -> None:
        """Slide what is resident on a device together. What cannot be filled again leaves all of them."""
        resident = {p.offsets[device]: p for p in self._adapters.values() if p.resident and p.size(device)}
        allocator = self.spaces[device].allocator
        moves = allocator.compact(offset for offset, packed in resident.items() if packed.pins)
        moving = [resident[source] for source, _, _ in moves]
        for packed, (_, target, _) in zip(moving, moves, strict=True):
            packed.offsets[device] = target
        self.placements += bool(moves)
        try:
            for at, packed in enumerate(moving):
                left = moving[at:]
                self._fill(packed, device)
                self._write_rows(packed, device)
        except BaseException:
            for packed in left:
                self._evict(packed)
            raise

    def _write_rows(self, packed: Packed, device: int) -> None:
        self.spaces[device].write(packed.slot, packed.rows, packed.shift(device))
