"""Memory on the host in which blobs lie: counted, and bounded where that is asked for."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import errors

_LOOSE = 8  # a part of a blob: memory that is so much larger than it may be used for it
_ALONE = 2  # references to something in a list that nobody else has: the list's and `getrefcount`'s


@dataclass(slots=True)
class Block:
    """A blob that has no content yet. `nbytes`: what is counted for it. `memory`: what it lies in, under a bound."""

    blob: Tensor
    nbytes: int
    memory: Any = None


class Host:
    """How many bytes adapters take on the host, and the memory of their blobs.

    Args:
        dtype: of blobs. `pin`: put them into memory that a GPU copies from.
        beside: bytes that each adapter has beside its blob.
        most: bytes, None for no bound.

    `used`: bytes that are counted now. `make_room`: called with nothing locked when so many bytes more, for what a
    label says, would be beyond the bound: it gives something back, or raises `CapacityError`.

    Under a bound a blob lies in pages of its own, which go back to the system when it is dropped, or are the next
    one's: fresh pages take longer to get than to fill. Thread-safe.
    """

    def __init__(self, dtype: torch.dtype, pin: bool, beside: int, most: int | None) -> None:
        self.most = most
        self.used = 0
        self.make_room: Callable[[int, str], None] = self._refuse
        self._dtype = dtype
        self._pin = pin
        self._beside = beside
        self._spare: list[Any] = []  # that of the last one that was dropped
        self._lock = threading.Lock()

    def block(self, numel: int, label: str) -> Block:
        """Room for a blob of so many elements.

        Raises:
            CapacityError: there is none within the bound.
        """
        size = numel * self._dtype.itemsize
        memory = self._count(size + self._beside, label, size)
        if self.most is None or self._pin:
            return Block(torch.empty(numel, dtype=self._dtype, pin_memory=self._pin), size + self._beside)
        if memory is None:
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        blob = torch.frombuffer(memory, dtype=self._dtype, count=numel) if numel else torch.empty(0, dtype=self._dtype)
        return Block(blob, size + self._beside, memory)

    def count(self, nbytes: int, label: str) -> None:
        """Count what lies elsewhere; raises as `block`."""
        self._count(nbytes, label)

    def give_back(self, nbytes: int, memory: Any = None) -> None:
        """What `block` or `count` counted; nobody writes to it any more, and who reads it still does."""
        with self._lock:
            self.used -= nbytes
            if memory is not None:
                self._spare[:] = [memory]

    def _count(self, nbytes: int, label: str, size: int = 0) -> Any:
        """Returns memory that has room for `size` bytes, if there is some to be used again."""
        while True:
            with self._lock:
                if self.most is None or self.used + nbytes <= self.most:
                    self.used += nbytes
                    memory = self._spare[0] if size and self._has_room(size) else None
                    self._spare.clear()
                    return memory
            self.make_room(nbytes, label)

    def _has_room(self, size: int) -> bool:
        """Whether nobody reads what was dropped last, and it has room for `size` bytes and not many more."""
        return (
            bool(self._spare)
            and size <= len(self._spare[0]) <= size + size // _LOOSE
            and sys.getrefcount(self._spare[0]) == _ALONE
        )

    def _refuse(self, nbytes: int, label: str) -> None:
        raise errors.CapacityError(
            f"{label} needs {nbytes:,} bytes on the host; host_memory has {self.most or 0:,}, {self.used:,} of which "
            f"are taken"
        )
