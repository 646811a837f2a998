"""The tensors of a safetensors file that stay there, and are read whenever they are asked for, whole or as slices.

A file that was written to or replaced since is refused, since its tensors would be of two moments.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from .. import errors
from .header import DTYPES, Place

Spans = tuple[tuple[int, int], ...]


class OnDisk(Mapping[str, Tensor]):
    """Key -> tensor, in memory of its own each time.

    Args:
        path: of the file. `state`: what it was when its header was read. `start`: of its first byte behind that.
        places: key -> where the tensor lies, of a dtype of `DTYPES`.
        slices: key -> a dimension, and the starts and ends of what is read of it, one behind another; of other keys all
            is read.

    Reading raises `AdapterError` where the file has changed, or a value is not finite.
    """

    def __init__(
        self,
        path: Path,
        state: os.stat_result,
        start: int,
        places: Mapping[str, Place],
        slices: Mapping[str, tuple[int, Spans]] | None = None,
    ) -> None:
        self._path, self._state, self._start = path, state, start
        self._places = dict(places)
        self._slices = dict(slices or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor, without reading it."""
        return self._places[key].shape

    def header(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(key, dtype, shape) of each tensor."""
        return [(key, place.dtype, place.shape) for key, place in self._places.items()]

    def named(self, keys: Mapping[str, str]) -> OnDisk:
        """The same tensors under other keys: new -> old."""
        return OnDisk(self._path, self._state, self._start, {new: self._places[old] for new, old in keys.items()})

    def narrowed(self, slices: Mapping[str, tuple[int, Spans]]) -> OnDisk:
        """The same, with slices in place of some tensors; see the class."""
        return OnDisk(self._path, self._state, self._start, self._places, slices)

    def __getitem__(self, key: str) -> Tensor:
        place = self._places[key]
        dim, spans = self._slices.get(key, (0, ()))
        shape = list(place.shape)
        if spans:
            shape[dim] = sum(end - start for start, end in spans)
        dtype = DTYPES[place.dtype]
        rows = math.prod(place.shape[:dim]) if spans else 1
        step = (place.end - place.start) // max(rows, 1)  # bytes of a row, all that lies behind one index before `dim`
        each = math.prod(place.shape[dim + 1 :]) * dtype.itemsize
        pieces = [(start * each, end * each) for start, end in spans] or [(0, step)]
        buffer = bytearray(math.prod(shape) * dtype.itemsize)
        if not buffer:
            return torch.empty(shape, dtype=dtype)
        rest, first = memoryview(buffer), self._start + place.start
        descriptor = self._open()
        try:
            for row in range(rows):
                for start, end in pieces:
                    rest = self._fill(descriptor, rest, first + row * step + start, end - start)
        finally:
            os.close(descriptor)
        tensor = torch.frombuffer(buffer, dtype=dtype).view(shape)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
            raise errors.AdapterError(f"{self._path}: {key} has values that are NaN or infinite; all must be finite")
        return tensor

    def _open(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._refuse(error.strerror or "it is gone")
        now, then = os.fstat(descriptor), self._state
        if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (
            then.st_dev, then.st_ino, then.st_size, then.st_mtime_ns
        ):  # fmt: skip
            os.close(descriptor)
            self._refuse("it was written to or replaced")
        return descriptor

    def _fill(self, descriptor: int, rest: memoryview, start: int, count: int) -> memoryview:
        """Read `count` bytes from `start` on to the front of `rest`; gives what remains of it."""
        while count:
            if not (got := os.preadv(descriptor, [rest[:count]], start)):
                self._refuse("it ends before its last byte")
            rest, start, count = rest[got:], start + got, count - got
        return rest

    def _refuse(self, why: str) -> NoReturn:
        raise errors.AdapterError(
            f"{self._path} cannot be read again ({why}): of an adapter on a model that is split over processes, each "
            f"keeps its part, and reads the rest when it is merged or saved. Leave the file as it was, or load it again"
        )
