"""`Space`: the arena on one device, and the tables of the modules that are called there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .. import layout
from ..ops import dispatch
from .allocator import Allocator
from .memory import Room, fixed, give_back, reserve
from .pack import ALIGNMENT, OFFSETS


class Space:
    """A buffer on one device and what points into it.

    Args:
        device, dtype: of the buffer.
        room: how many bytes it has, and how they are used; or just their number.
        modules: the numbers of the modules that are called on the device, ascending; None where that is all of them.
        empty: the rows of the tables of all modules where nothing is resident, int64 (all modules, 2 * slots,
            TABLE_WIDTH).

    `arena` (capacity elements of `dtype`) and `tables` (int64, (modules, 2 * slots, TABLE_WIDTH), in the order of
    `modules`) keep their addresses for good. `own` picks the rows of its modules out of those of all. `implied`:
    whether all that reads the arena takes the identity beside a whole matrix for granted.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        room: Room | int,
        modules: Sequence[int] | None,
        empty: np.ndarray,
    ) -> None:
        self.device = device
        self.room = fixed(room) if isinstance(room, int) else room
        self.arena, self._pages = reserve(self.room.size // ALIGNMENT * ALIGNMENT, dtype, device)
        self.allocator = Allocator(self.arena.numel())
        self.own: Any = slice(None) if modules is None else np.array(modules, dtype=np.int64)  # a slice takes no copy
        self.tables = torch.from_numpy(empty[self.own]).to(device)
        # Compiled code and captured graphs read the arena by the kernels that were chosen when it was made.
        self.implied = dispatch.backend(device, dtype) in ("cpu", "reference")
        self._slots = empty.shape[1] // 2
        self._exchanged: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Bytes of the arena."""
        return self.arena.numel() * self.arena.itemsize

    @property
    def free(self) -> int:
        """Bytes of the arena that nothing is in."""
        return self.allocator.free_size * self.arena.itemsize

    @property
    def used(self) -> int:
        """Bytes of the arena that hold resident adapters."""
        return self.capacity - self.free

    @property
    def exchanged(self) -> torch.Tensor:
        """`tables` with each module turned round (`layout.EXCHANGED`), kept up from the first time on."""
        if self._exchanged is None:
            self._exchanged = _exchange(self.tables)
        return self._exchanged

    def place(self, offset: int, size: int) -> torch.Tensor:
        """A part of the arena, in elements."""
        return self.arena[offset : offset + size]

    def write(self, slot: int, rows: np.ndarray, shift: int) -> None:
        """Both rows of a slot. `rows`: of all modules, (modules, 2, TABLE_WIDTH); `shift`: what their offsets lack."""
        own = rows[self.own]
        if shift:
            own = own.copy()
            for column in OFFSETS:
                own[..., column] += np.where(own[..., column] >= 0, shift, 0)
        written = torch.from_numpy(own).to(self.device)
        self.tables[:, slot :: self._slots] = written
        if self._exchanged is not None:
            self._exchanged[:, slot :: self._slots] = _exchange(written)

    def give_back(self, at: int) -> None:
        """Let the system have the pages around element `at`, which nothing is in any more."""
        if self._pages is not None:
            start, end = (edge * self.arena.itemsize for edge in self.allocator.hole(at))
            give_back(self._pages, max(start, self.room.ready), end)


def _exchange(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a table, (..., TABLE_WIDTH), of the modules turned round."""
    out = torch.full_like(rows, -1)
    for column, source in layout.EXCHANGED.items():
        out[..., column] = rows[..., source]
    return out
